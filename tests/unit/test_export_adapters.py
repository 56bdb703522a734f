"""Adapters of a PEFT model in one process: the files are those of PEFT's own save_pretrained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import shardwise as sw
from tests.distributed.models import causal_model, transformers_fuses_experts

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in (
            "`is_gradient_checkpointing` is deprecated",
            "Model has `tie_word_embeddings=True` and a tied layer",
            "Setting `save_embedding_layers` to `True`",
        ):
            warnings.filterwarnings("ignore", message)
        yield


KINDS: Mapping[str, Any] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "dora, biases": {"target_modules": ["q_proj"], "use_dora": True, "bias": "all"},
    "an embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "task_type": "CAUSAL_LM"},
    "experts": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
}


def adapted(kind: str) -> Any:
    torch.manual_seed(0)
    model = causal_model("qwen3_moe" if kind == "experts" else "qwen3_tied").to(torch.bfloat16)
    made = peft.get_peft_model(model, peft.LoraConfig(r=3, **KINDS[kind]))
    for parameter in made.parameters():
        nn.init.normal_(parameter.data, std=0.1)
    return made


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_those_of_peft(tmp_path: Path, kind: str) -> None:
    if kind == "experts" and not transformers_fuses_experts():
        pytest.skip("transformers 4 keeps experts apart")
    model = adapted(kind)
    if kind == "plain":
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    model.save_pretrained(tmp_path / "theirs")
    before = {name: config.inference_mode for name, config in model.peft_config.items()}
    report = sw.export_checkpoint(model, tmp_path / "ours")
    assert files_of(tmp_path / "ours") == files_of(tmp_path / "theirs")
    assert report.kind == "adapter"
    assert report.tensors == sum(len(load_file(p)) for p in (tmp_path / "ours").rglob("*.safetensors"))
    assert {name: config.inference_mode for name, config in model.peft_config.items()} == before
    if kind == "plain":
        assert set(report.files) == {"adapter_model.safetensors", "second/adapter_model.safetensors"}
        sw.export_checkpoint(model, tmp_path / "ours", overwrite=True)


def test_an_adapter_in_another_dtype(tmp_path: Path) -> None:
    model = adapted("plain")
    sw.export_checkpoint(model, tmp_path / "ours", dtype=torch.float32)
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


# --- merged into the base ---

MERGED: Mapping[str, Any] = {
    "plain": {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 12},
    "an embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules_to_save": {"target_modules": ["v_proj"], "modules_to_save": ["norm"]},
    "conv1d": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("kind", MERGED)
def test_merged_weights_are_those_of_peft(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    base = causal_model({"conv1d": "gpt2", "an embedding": "qwen3_untied"}.get(kind, "qwen3_tied"))
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, **MERGED[kind]))
    for parameter in model.parameters():
        nn.init.normal_(parameter.data, std=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = sw.export_checkpoint(model, tmp_path / "ours", adapters="merge")
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert report.kind == "model"
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    ours, theirs = files_of(tmp_path / "ours"), files_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert ours["config.json"] == theirs["config.json"]
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    got = load_file(tmp_path / "ours" / "model.safetensors")
    assert got.keys() == stored.keys()
    for name, value in stored.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_two_active_adapters_are_both_added_and_an_inactive_one_is_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(causal_model("qwen3_untied"), peft.LoraConfig(r=3, target_modules=["q_proj"]))
    for name in ("second", "third"):
        model.add_adapter(name, peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    for parameter in model.parameters():
        nn.init.normal_(parameter.data, std=0.1)
    model.base_model.set_adapter(["default", "second"])
    sw.export_checkpoint(model, tmp_path / "ours", adapters="merge")
    model.merge_adapter()  # which is not added a second time
    sw.export_checkpoint(model, tmp_path / "merged before", adapters="merge")
    ours = [load_file(tmp_path / name / "model.safetensors") for name in ("ours", "merged before")]
    model.unmerge_adapter()
    for name, value in model.merge_and_unload().state_dict().items():
        for got in ours:
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_an_adapter_on_a_tied_weight_is_not_merged(tmp_path: Path) -> None:
    with pytest.raises(
        sw.ConfigurationError, match=r"embed_tokens.weight = lm_head.weight: .*adapters='alone'"
    ):
        sw.export_checkpoint(adapted("an embedding"), tmp_path / "ours", adapters="merge")


@pytest.mark.parametrize("kind", ["dora, biases", "experts"])
def test_what_cannot_be_merged_on_shards_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    if kind == "experts" and not transformers_fuses_experts():
        pytest.skip("transformers 4 keeps experts apart")
    with pytest.raises(sw.ConfigurationError, match=r"base_model\.\S+: expected LoRA .*adapters='alone'"):
        sw.export_checkpoint(adapted(kind), tmp_path / "ours", adapters="merge")
    with pytest.raises(sw.ConfigurationError, match="adapters: expected 'alone' or 'merge' for a PEFT model"):
        sw.export_checkpoint(adapted(kind), tmp_path / "ours", adapters="base")
    with pytest.raises(sw.ConfigurationError, match="got 'merge' for Qwen3ForCausalLM"):
        sw.export_checkpoint(causal_model("qwen3_tied"), tmp_path / "ours", adapters="merge")
    assert not list(tmp_path.iterdir())
