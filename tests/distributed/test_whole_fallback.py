"""A conversion that computes is done on whole tensors, once in the job; the rest of the model is read in shards as ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

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
