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
