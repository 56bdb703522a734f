"""Placements that are not rows of everything: columns, parameters left out, shards in host memory, fewer rows than ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

import shardwise as sw
from shardwise.materialization.storage import fsdp_params_of
from shardwise.testing import RankPool
from tests.distributed.layouts import mesh_of, shard_pointers
from tests.distributed.models import check_equal, from_checkpoint
from tests.distributed.steps import (
    Checkpoint,
    backward,
    by_strategy,
    check_gradients,
    language_loss,
    load,
    local_of,
    make_strategy,
    own_rows,
    reference_gradients,
    reshard_all,
    token_batch,
)

pytestmark = pytest.mark.distributed

TIMEOUT_SECONDS = 60.0
LEFT_OUT = "model.norm.weight"


def columns(parameter: nn.Parameter) -> Shard | None:
    return Shard(1) if parameter.ndim == 2 else None


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "fewer rows than ranks": dict,
    "columns": lambda: {"shard_placement_fn": columns},
    "left out": lambda: {"ignored_params": [LEFT_OUT]},
    "in host memory": lambda: {"cpu_offload": True},
}


@by_strategy
@pytest.mark.parametrize("option", OPTIONS)
def test_a_placement(pool: RankPool, checkpoint: Checkpoint, strategy: str, option: str) -> None:
    kind = "qwen3_moe" if option == "fewer rows than ranks" else "qwen3_tied"
    pool.run(wrap_and_train, checkpoint(kind), strategy, option, ranks=4)


def wrap_and_train(directory: str, name: str, option: str) -> None:
    """Wrap, check every value, and take one pass that moves no shard and gives a single process's gradients."""
    expected = from_checkpoint(directory, dtype=torch.float32)
    reference = reference_gradients(directory)
    for defer in (True, False):
        strategy = make_strategy(name, fsdp_config=OPTIONS[option](), timeout=TIMEOUT_SECONDS)
        model = strategy.wrap_model(load(strategy, directory, defer=defer, dtype=torch.float32))
        check_equal(model, expected)
        assert sw.verify_shards(model, directory, timeout=TIMEOUT_SECONDS).is_equal
        require_option(strategy.unwrap_model(model), option)
        before = shard_pointers(model)
        backward(strategy, language_loss(model, own_rows(token_batch())))
        reshard_all(model)
        assert shard_pointers(model) == before
        if option == "left out":  # FSDP2 leaves the gradients of these to the caller
            left_out = model.get_parameter(LEFT_OUT).grad
            dist.all_reduce(left_out)
            left_out /= dist.get_world_size()
        check_gradients(model, reference)


def require_option(model: nn.Module, option: str) -> None:
    """Fail unless the option has reached FSDP2."""
    if option == "fewer rows than ranks":
        router = local_of(model.get_parameter("model.layers.0.mlp.gate.weight"))
        assert router.shape == ((0 if dist.get_rank() == 3 else 1), 32)
    elif option == "columns":
        assert {p.placements[0].dim for p in model.parameters() if p.ndim == 2} == {1}
    elif option == "left out":
        whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        assert whole == [LEFT_OUT]
    else:
        assert all(record.offload_to_cpu for record in fsdp_params_of(model))


@pytest.mark.parametrize("efficient", [True, False])
def test_ranks_that_would_cut_a_parameter_differently(pool: RankPool, efficient: bool) -> None:
    """FSDP2 gathers rows of one rank and columns of another, whose sizes are the same, without a word."""
    for error in pool.run_to_errors(cut_differently, efficient, ranks=2):
        assert isinstance(error, sw.RankError)
        assert "shard_placement_fn 0.weight: S(0)" in str(error)
        assert "shard_placement_fn 0.weight: S(1)" in str(error)


def cut_differently(efficient: bool) -> None:
    own = Shard(dist.get_rank())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    options = {"shard_placement_fn": lambda _: own}
    make_strategy("native_fsdp", fsdp_config=options, memory_efficient_init=efficient).wrap_model(model)


# --- several meshes in one process ---


@by_strategy
def test_two_strategies_on_different_meshes(pool: RankPool, checkpoint: Checkpoint, strategy: str) -> None:
    pool.run(train_on_two_meshes, strategy, checkpoint("qwen3_tied"), checkpoint("qwen3_untied"), ranks=4)


def train_on_two_meshes(name: str, first: str, second: str) -> None:
    """Two models, one over all ranks and one replicated, wrapped and trained in turns: neither touches the other."""
    directories = (first, second)
    meshes = (mesh_of(dp_shard=4), mesh_of(dp_replicate=2, dp_shard=2))
    strategies = [make_strategy(name, device_mesh=mesh, timeout=TIMEOUT_SECONDS) for mesh in meshes]
    models = [
        load(strategy, directory, defer=True, dtype=torch.float32)
        for strategy, directory in zip(strategies, directories, strict=True)
    ]
    for index in (1, 0):
        models[index] = strategies[index].wrap_model(models[index])
    assert [p.device_mesh.ndim for p in (next(model.parameters()) for model in models)] == [1, 2]
    for model, strategy, directory in zip(models, strategies, directories, strict=True):
        backward(strategy, language_loss(model, own_rows(token_batch())))
        check_gradients(model, reference_gradients(directory))
    with torch.no_grad():
        for parameter in models[0].parameters():
            local_of(parameter).zero_()
    reshard_all(models[1])
    check_equal(models[1], from_checkpoint(second, dtype=torch.float32))
    assert sw.verify_shards(models[1], second, timeout=TIMEOUT_SECONDS).is_equal
    assert not sw.verify_shards(models[0], first, timeout=TIMEOUT_SECONDS).is_equal
