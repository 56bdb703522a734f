"""More ranks than experts: a stack of matrices is sharded on a dim that wastes no memory."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import shardwise as sw
from shardwise.materialization import local_bytes_of
from shardwise.testing import RankPool
from tests.distributed.models import check_equal, from_checkpoint, transformers_fuses_experts
from tests.distributed.steps import (
    Checkpoint,
    backward,
    by_efficient,
    by_strategy,
    check_gradients,
    language_loss,
    load,
    make_strategy,
    own_rows,
    reference_gradients,
    token_batch,
    torch_optimizer,
)

pytestmark = pytest.mark.distributed

EXPERTS = 3
TIMEOUT_SECONDS = 60.0
fused = pytest.mark.skipif(
    not transformers_fuses_experts(), reason="transformers 4.57 keeps experts apart, as matrices"
)


class Stacked(nn.Module):
    """Experts of which there are fewer than ranks, stacked, one stack of them under two names."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.router = nn.Linear(8, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 8, 12) / 4)  # 4 ranks divide dim 1
        self.down = nn.Parameter(torch.randn(EXPERTS, 6, 8) / 4)  # and dim 2 alone
        self.odd = nn.Parameter(torch.randn(EXPERTS, 5, 7) / 4)  # none
        self.again = self.up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x).softmax(-1)
        inner = torch.einsum("bh,ehi->bei", x, self.up + self.again).tanh()[..., :6]
        outer = torch.einsum("bei,eih->beh", inner, self.down)
        return torch.einsum("be,beh->bh", weights, outer) + self.odd.mean()


@by_strategy
@by_efficient
def test_stacks_that_dim_0_would_pad(pool: RankPool, strategy: str, efficient: bool) -> None:
    pool.run(train_stacked, strategy, efficient, ranks=4)


def train_stacked(name: str, efficient: bool) -> None:
    """Shard, step once and save: dims, bytes and values are those of a process alone."""
    strategy = make_strategy(name, memory_efficient_init=efficient)
    reference = Stacked()
    model = Stacked(seed=0 if not efficient else dist.get_rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer = strategy.wrap_model(model, optimizer)
    dims = {name: parameter.placements[0].dim for name, parameter in model.named_parameters()}
    assert dims == {"router.weight": 0, "router.bias": 0, "up": 1, "down": 2, "odd": 0}
    for name in ("up", "down"):  # a quarter each, no padding
        local = getattr(model, name).to_local()
        assert 4 * local.untyped_storage().nbytes() == getattr(reference, name).nbytes
    check_equal(model, reference)
    inputs = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    loss = model(inputs[2 * dist.get_rank() :][:2]).square().mean()
    backward(strategy, loss)
    reference(inputs).square().mean().backward()
    check_gradients(model, reference)
    optimizer.step()
    torch.optim.SGD(reference.parameters(), lr=0.5).step()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    for name, value in whole.items():
        torch.testing.assert_close(value, reference.state_dict()[name])
    assert torch_optimizer(optimizer).param_groups[0]["params"][0].to_local().numel() > 0


@fused
@by_strategy
@pytest.mark.parametrize("defer", [True, False], ids=["from files", "from rank 0"])
def test_experts_of_a_transformers_model(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, defer: bool
) -> None:
    pool.run(train_experts, strategy, checkpoint("qwen3_moe"), defer, ranks=4)


def train_experts(name: str, directory: str, defer: bool) -> None:
    strategy = make_strategy(name)
    model = strategy.wrap_model(load(strategy, directory, defer=defer))
    check_equal(model, from_checkpoint(directory))
    stacks = [p for p in model.parameters() if p.ndim == 3]
    assert len(stacks) == 4
    for stack in stacks:
        assert stack.shape[0] == EXPERTS
        assert stack.placements == (Shard(1),)
        full_bytes = stack.numel() * stack.element_size()
        assert 4 * stack.to_local().untyped_storage().nbytes() == full_bytes
    assert sw.verify_shards(model, directory, timeout=TIMEOUT_SECONDS).is_equal


def test_a_step_with_experts_equals_one_process(pool: RankPool, checkpoint: Checkpoint) -> None:
    pool.run(gradients_of_experts, checkpoint("qwen3_moe"), ranks=4)


def gradients_of_experts(directory: str) -> None:
    strategy = make_strategy("native_fsdp")
    model = strategy.wrap_model(load(strategy, directory, defer=True, dtype=torch.float32))
    backward(strategy, language_loss(model, own_rows(token_batch())))
    check_gradients(model, reference_gradients(directory))


def test_the_log_says_so_once(pool: RankPool) -> None:
    of_rank = pool.run(log_of_a_wrap, ranks=4)
    assert of_rank[1:] == [[], [], []]
    assert len(of_rank[0]) == 1
    assert "2 parameters are not sharded on dim 0, whose rows 4 ranks would have to pad" in of_rank[0][0]
    assert "up (3, 8, 12) on dim 1; down (3, 6, 8) on dim 2." in of_rank[0][0]


def log_of_a_wrap() -> list[str]:
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("shardwise")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        make_strategy("native_fsdp").wrap_model(Stacked())
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return [line for line in lines if "sharded on dim 0" in line]


@pytest.mark.parametrize("option", ["own", "int"])
def test_the_callers_word_counts(pool: RankPool, option: str) -> None:
    pool.run(dims_with, option, ranks=4)


def dims_with(option: str) -> None:
    """An own placement is taken as it is; resharding over fewer ranks keeps rows, and gives a process's gradients."""
    config = {"own": {"shard_placement_fn": lambda _: None}, "int": {"reshard_after_forward": 2}}[option]
    model = make_strategy("native_fsdp", fsdp_config=config).wrap_model(Stacked())
    assert {parameter.placements[0].dim for parameter in model.parameters()} == {0}
    reference = Stacked()
    inputs = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    model(inputs).square().mean().backward()
    reference(inputs).square().mean().backward()
    check_gradients(model, reference)


# --- resharding over fewer ranks, and other dims ---


def columns(parameter: nn.Parameter) -> Shard | None:
    return Shard(-1) if parameter.ndim == 2 else None


class Columns(nn.Module):
    """Two layers, of which one is a unit of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.last = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.layers[0](x))
        return y


@by_strategy
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"reshard_after_forward": 2, "shard_placement_fn": columns},
            "reshard_after_forward=2 keeps gathered parameters over 2 of 4 ranks, which torch does for shards on dim 0 only; "
            "shard_placement_fn puts layers.0.weight on dim -1. Use reshard_after_forward=True or False",
        ),
        (
            {"reshard_after_forward": 3},
            "expected a number that divides the 4 ranks that parameters are sharded over, True or False, got 3",
        ),
    ],
    ids=["columns", "three of four"],
)
def test_resharding_that_torch_cannot_do_is_refused(
    pool: RankPool, strategy: str, config: dict[str, Any], message: str
) -> None:
    for error in pool.run_to_errors(wrap_columns, strategy, config, ranks=4):
        assert isinstance(error, sw.ConfigurationError | sw.PeerError)
        assert message in str(error)


def wrap_columns(strategy: str, config: dict[str, Any]) -> None:
    make_strategy(strategy, fsdp_config=config).wrap_model(Columns())


@pytest.mark.parametrize("reshard", [1, 2, 4])
def test_what_torch_does_with_columns(pool: RankPool, reshard: int) -> None:
    """Once this passes for 2, `refuse_reshard` has nothing to refuse."""
    pool.run(train_columns, reshard, ranks=4)


def train_columns(reshard: int) -> None:
    if reshard == 2:
        model = Columns()
        fully_shard(model.layers[0], reshard_after_forward=2, shard_placement_fn=columns)
        fully_shard(model, shard_placement_fn=columns)
        with pytest.raises(IndexError):
            model(torch.ones(2, 8)).sum().backward()
        return
    config = {"reshard_after_forward": reshard, "shard_placement_fn": columns}
    torch.manual_seed(0)
    model = make_strategy("native_fsdp", fsdp_config=config).wrap_model(Columns())
    torch.manual_seed(0)
    reference = Columns()
    for each in (model, reference):
        each(torch.ones(2, 8)).square().mean().backward()
    check_gradients(model, reference)


def test_less_memory_than_dim_0_takes(pool: RankPool) -> None:
    for saved, whole in pool.run(bytes_saved, ranks=4):
        # Dim 0 gives the first three ranks an expert each, and pads the last one's.
        assert saved == whole // 12


def bytes_saved() -> tuple[int, int]:
    """Return the bytes of a rank that the rule saves on two stacks, and these stacks' full size."""
    held = []
    for config in ({"shard_placement_fn": lambda _: None}, None):
        model = make_strategy("native_fsdp", fsdp_config=config).wrap_model(Stacked())
        held.append(local_bytes_of(model.parameters()))
    reference = Stacked()
    return held[0] - held[1], reference.up.nbytes + reference.down.nbytes
