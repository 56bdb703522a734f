"""What shardwise asks of transformers' private interfaces; a failure here says which of them a release has moved."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers

from shardwise.conversion import declaration_of, pinned_dtypes

FIVE = int(transformers.__version__.split(".")[0]) >= 5


@pytest.mark.skipif(not FIVE, reason="transformers 4 has no converters")
def test_renaming_takes_what_it_is_given() -> None:
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    parameters = list(inspect.signature(rename_source_key).parameters)
    assert parameters[:5] == [
        "source_key",
        "weight_renamings",
        "weight_converters",
        "base_model_prefix",
        "meta_state_dict",
    ]
    assert sorted(["a.10", "a.9"], key=dot_natural_key) == ["a.9", "a.10"]


@pytest.mark.skipif(not FIVE, reason="transformers 4 has no converters")
def test_a_converter_can_be_run_on_given_tensors() -> None:
    from transformers.core_model_loading import Concatenate, WeightConverter

    converter = WeightConverter(["a", "b"], "c", operations=[Concatenate(dim=0)])
    converter.collected_tensors["a"] = [torch.zeros(1, 2)]
    converter.collected_tensors["b"] = [torch.ones(1, 2)]
    made = converter.convert("x.c", model=None, config=None)
    assert made["x.c"].tolist() == [[0.0, 0.0], [1.0, 1.0]]


@pytest.mark.skipif(FIVE, reason="of transformers 4.57")
def test_the_renaming_method_of_4_57() -> None:
    method = transformers.PreTrainedModel._get_key_renaming_mapping
    assert {"loading_base_model_from_task_state_dict", "loading_task_model_from_base_state_dict"} <= set(
        inspect.signature(method).parameters
    )


def bert(cls: type) -> transformers.PreTrainedModel:
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        model: transformers.PreTrainedModel = cls(config)
    return model


def names_of(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def targets(model: torch.nn.Module, names: list[str]) -> dict[str, str]:
    declared = declaration_of(model, names_of(model), names, conversions=None)
    return {source: group.target for group in declared.groups for source in group.source_names}


def test_a_base_models_names_get_the_prefix_and_a_tasks_names_lose_it() -> None:
    task = bert(transformers.BertForMaskedLM)
    base = bert(transformers.BertModel)
    inner = "encoder.layer.0.output.dense.weight"
    assert targets(task, [inner]) == {inner: f"bert.{inner}"}
    assert targets(base, [f"bert.{inner}"]) == {f"bert.{inner}": inner}
    assert targets(task, [f"bert.{inner}"]) == {f"bert.{inner}": f"bert.{inner}"}


def test_very_old_names_are_translated() -> None:
    model = bert(transformers.BertForMaskedLM)
    old = "bert.embeddings.LayerNorm.gamma"
    assert targets(model, [old]) == {old: "bert.embeddings.LayerNorm.weight"}


def test_what_nothing_takes_is_unexpected_unless_the_class_says_so() -> None:
    model = bert(transformers.BertForMaskedLM)
    names = ["bert.embeddings.position_ids", "bert.nonsense"]
    declared = declaration_of(model, names_of(model), names, conversions=None)
    assert not declared.groups
    assert [n for n in declared.unexpected if not declared.may_be_unexpected(n)] == ["bert.nonsense"]


def test_modules_kept_in_float32_are_known_by_the_dtype_of_the_rest() -> None:
    config = transformers.T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    assert pinned_dtypes(model, torch.float16, stored=True)(name) is torch.float32
    assert pinned_dtypes(model, torch.float16, stored=True)("shared.weight") is None
    assert pinned_dtypes(model, torch.float32, stored=True)(name) is None
