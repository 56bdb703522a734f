"""Adapters of PEFT on meta start as PEFT starts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardwise as sw
from shardwise.materialization import entries_of, take_values

pytest.importorskip("peft")
# peft 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def base_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(0)
    directory, model = tmp_path_factory.mktemp("base"), base_model()
    model.save_pretrained(directory)
    return directory, model


def adapted(**options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"target_modules": ["q_proj", "embed_tokens"], "r": 4, **options})
    return without_values(get_peft_model(base_model(), config))


def without_values(model: Any) -> Any:
    take_values(entries_of(model), keep=False)
    return model


@pytest.mark.parametrize(
    ("start", "std"), [(True, (3 * 64) ** -0.5), ("gaussian", 0.25), ("Gaussian", 0.25)], ids=str
)
def test_lora_starts_as_the_base_model(base: tuple[Path, Any], start: Any, std: float) -> None:
    directory, reference = base
    model = adapted(init_lora_weights=start)
    report = sw.materialize(model, directory, missing=["*lora_*"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            assert parameter.eq(0).all(), name
        elif "lora_A" in name:
            assert parameter.std().item() == pytest.approx(std, rel=0.25), name
        elif "lora_embedding_B" in name:
            assert parameter.std().item() == pytest.approx(1.0, rel=0.25), name
        assert report.origins[name] == ("initialised" if "lora_" in name else "checkpoint")
    ids = torch.arange(8)[None]
    assert torch.equal(model.eval()(ids).logits, reference(ids).logits)


def test_each_adapter_has_its_own_start(base: tuple[Path, Any]) -> None:
    from peft import LoraConfig

    model = adapted(target_modules=["q_proj"])
    for name, rank, start in (("wide", 16, "gaussian"), ("both", 4, False)):
        model.add_adapter(
            name,
            LoraConfig(target_modules=["q_proj"], r=rank, init_lora_weights=start),
            low_cpu_mem_usage=True,
        )
    sw.materialize(model, base[0], missing=["*lora_*"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["wide"].weight.std().item() == pytest.approx(1 / 16, rel=0.2)
    assert layer.lora_A["default"].weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.2)
    assert layer.lora_B["wide"].weight.eq(0).all()
    assert layer.lora_B["both"].weight.std() > 0.1  # as torch builds a linear layer of 4 columns


@pytest.mark.parametrize("start", [True, False, "orthogonal"], ids=str)
def test_adapters_of_one_rank_differ(base: tuple[Path, Any], start: Any) -> None:
    """Adapters that start alike get the same gradients, and are one adapter for ever."""
    from peft import LoraConfig

    model = adapted(target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"], r=4), low_cpu_mem_usage=True)
    for config in model.peft_config.values():
        config.init_lora_weights = start
    sw.materialize(model, base[0], missing=["*lora_*"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    first, second = layer.lora_A["default"].weight, layer.lora_A["second"].weight
    assert abs(correlation(first, second)) < 0.3
    if start is False:
        assert abs(correlation(first, layer.lora_B["default"].weight)) < 0.3


def test_embeddings_adapters_of_one_rank_differ(base: tuple[Path, Any]) -> None:
    from peft import LoraConfig

    model = adapted(target_modules=["embed_tokens"])
    model.add_adapter("second", LoraConfig(target_modules=["embed_tokens"], r=4), low_cpu_mem_usage=True)
    sw.materialize(model, base[0], missing=["*lora_*"])
    layer = model.base_model.model.model.embed_tokens
    assert abs(correlation(*layer.lora_embedding_B.values())) < 0.3
    assert all(each.eq(0).all() for each in layer.lora_embedding_A.values())


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the correlation of two tensors' elements, in their order."""
    return torch.corrcoef(torch.stack([one.detach().flatten(), other.detach().flatten()]))[0, 1].item()


def test_orthogonal_needs_no_values(base: tuple[Path, Any]) -> None:
    model = adapted(target_modules=["q_proj"])
    model.peft_config["default"].init_lora_weights = "orthogonal"
    sw.materialize(model, base[0], missing=["*lora_*"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert product.abs().max() < 1e-5
    assert layer.lora_A["default"].weight.abs().max() > 0


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "eva", "lora_ga", "mica"]
)
def test_starts_from_base_values_or_data_are_refused(base: tuple[Path, Any], start: str) -> None:
    model = adapted(target_modules=["q_proj"])
    model.peft_config["default"].init_lora_weights = start  # PEFT itself fails on meta, or keeps quiet
    with pytest.raises(sw.ConfigurationError, match=rf"q_proj.lora_A.*{start}.*defer=False"):
        sw.materialize(model, base[0], missing=["*lora_*"])
    assert all(parameter.is_meta for parameter in model.parameters())  # before anything was allocated


def test_magnitudes_of_dora_are_refused(base: tuple[Path, Any]) -> None:
    model = adapted(target_modules=["q_proj"], use_dora=True)
    with pytest.raises(sw.ConfigurationError, match=r"lora_magnitude_vector.*DoRA.*defer=False"):
        sw.materialize(model, base[0], missing=["*lora_*"])


def test_rows_of_single_tokens_are_refused_with_their_own_reason(base: tuple[Path, Any]) -> None:
    model = adapted(target_modules=["q_proj"], trainable_token_indices=[1, 5])
    with pytest.raises(
        sw.ConfigurationError, match=r"trainable_tokens_delta.*got trainable_token_indices.*defer=False"
    ) as caught:
        sw.materialize(model, base[0], missing="init")
    assert "init_lora_weights" not in str(caught.value)


def test_other_adapters_are_refused(base: tuple[Path, Any]) -> None:
    from peft import LoHaConfig, get_peft_model

    model = without_values(get_peft_model(base_model(), LoHaConfig(target_modules=["q_proj"])))
    with pytest.raises(sw.ConfigurationError, match=r"hada_.*PEFT's loha"):
        sw.materialize(model, base[0], missing=["*hada_*"])


def test_a_trainable_copy_starts_as_what_it_is_a_copy_of(base: tuple[Path, Any]) -> None:
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    report = sw.materialize(model, base[0], missing=["*lora_*"])
    wrapper = model.base_model.model.lm_head
    assert isinstance(wrapper.original_module, nn.Linear)
    assert torch.equal(wrapper.modules_to_save["default"].weight, base[1].lm_head.weight)
    assert torch.equal(wrapper.original_module.weight, base[1].lm_head.weight)
    name = "base_model.model.lm_head.modules_to_save.default.weight"
    assert report.origins[name] == "checkpoint"
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.zero_()
    assert torch.equal(wrapper.original_module.weight, base[1].lm_head.weight)
