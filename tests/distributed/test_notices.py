"""What works and yet surprises is said once, by the source rank."""

from __future__ import annotations

import pytest
import torch

from shardwise.testing import RankPool
from tests.distributed.steps import Checkpoint, by_strategy, load, logged, make_strategy

pytestmark = pytest.mark.distributed


@by_strategy
def test_an_optimizer_on_bf16_weights_is_warned_of(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    first, second = pool.run(wrap_in, checkpoint("qwen3_tied"), strategy, "auto", "bf16", True, ranks=2)
    (line,) = first
    assert "parameters that are stored in bfloat16 (model.embed_tokens.weight, " in line
    assert " and 19 more)" in line
    assert "dtype=torch.float32" in line
    assert "mixed_precision='bf16'" in line
    assert second == []


@pytest.mark.parametrize(
    ("dtype", "mixed_precision", "trains"),
    [
        (torch.float32, "bf16", True),
        ("auto", "no", True),  # asked for: everything in bf16
        ("auto", "bf16", False),  # a frozen base under an adapter
    ],
)
def test_nothing_else_is(
    pool: RankPool, checkpoint: Checkpoint, dtype: object, mixed_precision: str, trains: bool
) -> None:
    arguments = (checkpoint("qwen3_tied"), "native_fsdp", dtype, mixed_precision, trains)
    assert pool.run(wrap_in, *arguments, ranks=2) == [[], []]


def test_an_optimizer_that_joins_later_is_warned_of(pool: RankPool, checkpoint: Checkpoint) -> None:
    first, second = pool.run(join_later, checkpoint("qwen3_tied"), ranks=2)
    assert [line.count("stored in bfloat16") for line in first] == [1]
    assert second == []


def wrap_in(directory: str, name: str, dtype: object, mixed_precision: str, trains: bool) -> list[str]:
    strategy = make_strategy(name, mixed_precision=mixed_precision)
    model = load(strategy, directory, defer=True, dtype=dtype)
    model.requires_grad_(trains)
    optimizer = torch.optim.AdamW(model.parameters())
    with logged() as lines:
        strategy.wrap_model(model, optimizer)
    return lines


def join_later(directory: str) -> list[str]:
    strategy = make_strategy("native_fsdp", mixed_precision="bf16")
    with logged() as lines:
        model = strategy.wrap_model(load(strategy, directory, defer=True))
        assert lines == []
        strategy.wrap_optimizer(torch.optim.AdamW(model.parameters()))
    return lines


@by_strategy
def test_one_rank_is_told_how_to_start_several(pool: RankPool, checkpoint: Checkpoint, strategy: str) -> None:
    arguments = (checkpoint("qwen3_tied"), strategy, "auto", "no", True)
    ((line,),) = pool.run(wrap_in, *arguments, ranks=1)
    assert "the mesh has one rank, which holds the whole model" in line
    assert "torchrun --nproc-per-node N" in line
    assert "accelerate launch --use_fsdp --fsdp_version 2 --num_processes N" in line
    assert "\n" not in line
