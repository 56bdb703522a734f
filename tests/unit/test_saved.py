"""What a checkpoint of a model consists of: names, layouts, ties, and what has no way back."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import transformers
from torch import nn

from shardwise.conversion import SavedTensor, saved_tensors
from shardwise.conversion.ties import saved_names
from shardwise.errors import ConfigurationError, UnsupportedParameterError
from shardwise.export.held import held_of
from tests.unit.models import Tied

FIVE = int(transformers.__version__.split(".")[0]) >= 5
needs_converters = pytest.mark.skipif(not FIVE, reason="transformers 4 converts nothing")


def saved_of(model: nn.Module) -> dict[str, SavedTensor]:
    held = held_of(model, None)
    return {each.name: each for each in saved_tensors(model, held.stored, held.ties)}


def qwen(cls: str = "Qwen3ForCausalLM", **sizes: Any) -> Any:
    config = getattr(transformers, cls.replace("ForCausalLM", "Config"))(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        **sizes,
    )
    return getattr(transformers, cls)(config)


def test_a_plain_module_keeps_its_names_and_a_tied_tensor_the_first_of_them() -> None:
    saved = saved_of(Tied())
    names = ["embed.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    assert list(saved) == [*names, "norm.num_batches_tracked"]  # no head, no buffer that is not persistent
    assert saved["norm.num_batches_tracked"].shape == ()


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_left_out_as_save_pretrained_does(tied: bool) -> None:
    saved = saved_of(qwen(tie_word_embeddings=tied))
    assert ("lm_head.weight" in saved) is not tied
    assert "model.embed_tokens.weight" in saved


def test_a_tie_that_the_class_does_not_declare_is_refused_by_name() -> None:
    model = qwen(tie_word_embeddings=False)
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    with pytest.raises(
        UnsupportedParameterError, match=r"gate_proj.weight = .*up_proj.weight.*_tied_weights_keys"
    ):
        saved_of(model)


def test_of_names_that_are_all_declared_as_ties_the_last_one_is_kept() -> None:
    kept = saved_names(["b", "a", "other"], [["b", "a"]], is_tied=lambda name: name != "other")
    assert kept == ["b", "other"]


@needs_converters
def test_stacked_experts_are_apart_again() -> None:
    model = qwen("Qwen3MoeForCausalLM", num_experts=3, moe_intermediate_size=8, num_experts_per_tok=2)
    saved = saved_of(model)
    down = saved["model.layers.0.mlp.experts.2.down_proj.weight"]
    assert down.shape == (16, 8)
    (taken,) = down.taken
    assert taken.fqn == "model.layers.0.mlp.experts.down_proj"
    assert taken.piece.region.start == (2, 0, 0)
    assert all(each.whole is None for each in saved.values())


@needs_converters
def test_what_computes_is_made_of_whole_tensors_and_what_has_no_way_back_is_refused() -> None:
    from transformers import core_model_loading as core

    class Halve(core.ConversionOps):
        def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
            (values,) = input_dict.values()
            return {target_patterns[0]: (values[0] if isinstance(values, list) else values) * 0.5}

    class Double(core.ConversionOps):
        def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
            (values,) = input_dict.values()
            return {target_patterns[0]: (values[0] if isinstance(values, list) else values) * 2}

        @property
        def reverse_op(self) -> Any:
            return Halve()

    model = qwen()
    model._weight_conversions = [
        core.WeightConverter("mlp.up.w", "mlp.up_proj.weight", operations=[Double()])
    ]
    made = saved_of(model)["model.layers.0.mlp.up.w"]
    assert made.taken == ()
    assert made.whole is not None
    assert made.whole.group.source_names == ("model.layers.0.mlp.up_proj.weight",)
    assert made.shape == (24, 16)
    model._weight_conversions = [core.WeightConverter("mlp.up.w", "mlp.up_proj.weight", operations=[Halve()])]
    with pytest.raises(ConfigurationError, match="a way back"):
        saved_of(model)


@pytest.mark.skipif(FIVE, reason="of transformers 4.57")
def test_4_57_still_has_what_is_asked_of_it() -> None:
    from transformers.modeling_utils import _get_tied_weight_keys

    assert list(inspect.signature(_get_tied_weight_keys).parameters) == ["module", "prefix"]
    assert transformers.PreTrainedModel._fix_state_dict_key_on_save("a") == ("a", False)


@needs_converters
def test_5_still_has_what_is_asked_of_it() -> None:
    from transformers.core_model_loading import apply_converters, apply_renamings
    from transformers.modeling_utils import _get_tied_weight_keys

    assert list(inspect.signature(apply_renamings).parameters) == ["source_key", "weight_renamings"]
    assert list(inspect.signature(apply_converters).parameters) == ["source_key", "weight_converters"]
    assert _get_tied_weight_keys(qwen()) == ["lm_head.weight"]
