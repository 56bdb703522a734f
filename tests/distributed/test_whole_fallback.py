"""A conversion that computes is done on whole tensors, once in the job; the rest of the model is read in shards as ever."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardwise.errors import ShardwiseError
from shardwise.testing import RankPool
from tests.distributed.models import LAYERS, check_equal, from_checkpoint, transformers_fuses_experts
from tests.distributed.steps import Checkpoint, load, make_strategy, own_rows, token_batch

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not transformers_fuses_experts(), reason="transformers 4 declares no conversions of tensors"
    ),
]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_operation_that_nobody_knows(pool: RankPool, checkpoint: Checkpoint, ranks: int) -> None:
    pool.run(load_with_operation, checkpoint("qwen3_moe"), ranks=ranks)


def load_with_operation(directory: str) -> None:
    plain = from_checkpoint(directory)
    with centred_experts():
        expected: Any = from_checkpoint(directory)
        strategy = make_strategy("native_fsdp")
        model = strategy.wrap_model(load(strategy, directory, defer=True))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert not torch.equal(expected.get_parameter(name), plain.get_parameter(name))  # the operation has run
    check_equal(model, expected)
    ids = own_rows(token_batch())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    report = strategy.last_report
    assert sorted(report.converted) == [
        f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in range(LAYERS)
    ]
    assert report.origins[name] == "checkpoint"
    assert report.route == "direct"


@contextmanager
def centred_experts() -> Iterator[None]:
    """Let the gate and up projections of all experts be moved by their mean while they are fused."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Centre(ConversionOps):
        def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
            def centred(value: Any) -> Any:
                return [centred(each) for each in value] if isinstance(value, list) else value - value.mean(0)

            return {pattern: centred(value) for pattern, value in input_dict.items()}

    before = conversion_mapping.get_checkpoint_conversion_mapping("qwen3_moe")
    changed = conversion_mapping.get_checkpoint_conversion_mapping("qwen3_moe")
    (converter,) = (
        each
        for each in changed
        if isinstance(each, WeightConverter) and "gate_up" in str(each.target_patterns)
    )
    converter.operations.append(Centre())
    register = conversion_mapping.register_checkpoint_conversion_mapping
    register("qwen3_moe", changed, overwrite=True)
    try:
        yield
    finally:
        register("qwen3_moe", before, overwrite=True)
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard("qwen3_moe")


def halves_swapped(value: torch.Tensor) -> torch.Tensor:
    made = torch.empty(value.shape, dtype=value.dtype)
    half = value.shape[0] // 2
    made[:-half], made[-half:] = value[half:], value[:half]
    return made


def failing(value: torch.Tensor) -> torch.Tensor:
    raise ValueError(f"a zero in {value.abs().max().item()}")


WANT_VALUES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a tensor made": lambda v: v * torch.arange(1, v.shape[0] + 1, dtype=v.dtype)[:, None],
    "allocated and filled": halves_swapped,
    "a question": lambda v: v if v.abs().max() > 0 else -v,
    "numpy": lambda v: torch.from_numpy(v.float().numpy()[::-1].copy()).to(v.dtype),
    "another dtype": lambda v: v.float(),
    "another dtype of numbers": lambda v: v.double() / 3,
}


@pytest.mark.parametrize("kind", WANT_VALUES)
def test_an_operation_that_cannot_run_without_values(
    pool: RankPool, checkpoint: Checkpoint, kind: str
) -> None:
    pool.run(load_with_head_by, checkpoint("qwen3_untied"), kind, ranks=2)


def load_with_head_by(directory: str, kind: str) -> None:
    with converted("lm_head.weight", WANT_VALUES[kind]):
        expected: Any = from_checkpoint(directory)
        strategy = make_strategy("native_fsdp")
        model = strategy.wrap_model(load(strategy, directory, defer=True))
    check_equal(model, expected)
    assert strategy.last_report.converted == ("lm_head.weight",)


def test_an_operation_that_fails_on_values_is_named_on_every_rank(
    pool: RankPool, checkpoint: Checkpoint
) -> None:
    for text in pool.run(error_of_failing, checkpoint("qwen3_untied"), ranks=2):
        assert "lm_head.weight: expected the conversion Operation to work on" in text
        assert "(97, 32)" in text
        assert "ValueError: a zero in" in text


def error_of_failing(directory: str) -> str:
    with converted("lm_head.weight", failing):
        strategy = make_strategy("native_fsdp")
        with pytest.raises(ShardwiseError) as caught:
            strategy.wrap_model(load(strategy, directory, defer=True))
    return str(caught.value)


def test_a_dtype_that_only_values_show_is_refused_by_name(pool: RankPool, checkpoint: Checkpoint) -> None:
    for text in pool.run(error_of_unforeseen_dtype, checkpoint("qwen3_untied"), ranks=2):
        assert "lm_head.weight: expected bfloat16 from the conversion Operation, got float32" in text


def error_of_unforeseen_dtype(directory: str) -> str:
    with converted("lm_head.weight", lambda v: torch.from_numpy(v.float().numpy().copy())):
        strategy = make_strategy("native_fsdp")
        with pytest.raises(ShardwiseError) as caught:
            strategy.wrap_model(load(strategy, directory, defer=True))
    return str(caught.value)


def test_a_tie_that_is_stored_twice_behind_a_conversion_is_refused_with_a_remedy_that_works(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    directory = shutil.copytree(checkpoint("qwen3_tied"), tmp_path / "both")
    file = directory / "model.safetensors"
    stored = load_file(file)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(stored, file, metadata={"format": "pt"})
    pool.run(load_both_names, str(directory), ranks=2)


def load_both_names(directory: str) -> None:
    with converted("embed_tokens.weight", lambda v: v.flip(0)):
        expected = from_checkpoint(directory)
        strategy = make_strategy("native_fsdp")
        with pytest.raises(ShardwiseError, match=r"A conversion makes at least one.*defer=False"):
            load(strategy, directory, defer=True)
        check_equal(strategy.wrap_model(load(strategy, directory, defer=False)), expected)


@contextmanager
def converted(name: str, operation: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Let a weight of Qwen3 be made by an operation."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Operation(ConversionOps):
        def convert(
            self, input_dict: dict[str, Any], *, target_patterns: list[str], **_: Any
        ) -> dict[str, Any]:
            (value,) = (of[0] if isinstance(of, list) else of for of in input_dict.values())
            return {target_patterns[0]: operation(value)}

    converter = WeightConverter(name, name, operations=[Operation()])
    conversion_mapping.register_checkpoint_conversion_mapping("qwen3", [converter], overwrite=True)
    try:
        yield
    finally:
        del conversion_mapping._checkpoint_conversion_mapping_cache["qwen3"]
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard("qwen3")
