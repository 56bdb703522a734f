"""The mesh of a strategy, over a process group that moves nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import shardwise as sw
from shardwise.errors import ConfigurationError
from shardwise.materialization import device_of
from shardwise.strategies.mesh import (
    default_device_type,
    device_type_of,
    ranks_of,
    resolve_mesh,
    source_rank_of,
)

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def world() -> Iterator[Callable[..., None]]:
    """Return a function that makes this process a rank of a job whose other ranks do not exist."""

    def make(size: int, rank: int = 0) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


def mesh(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


@pytest.mark.parametrize("name", ["dp_shard", "fsdp", "anything"])
def test_one_axis_of_any_name_is_taken_as_it_is(world: Any, name: str) -> None:
    world(4)
    given = mesh(4, names=(name,))
    assert resolve_mesh(given) is given


def test_one_axis_needs_no_name(world: Any) -> None:
    world(4)
    given = mesh(4)
    assert resolve_mesh(given) is given


@pytest.mark.parametrize(
    "names", [("dp_replicate", "dp_shard"), ("dp", "fsdp"), ("dp", "dp_shard"), ("dp_replicate", "fsdp")]
)
def test_replicate_and_shard_are_taken(world: Any, names: tuple[str, str]) -> None:
    world(4)
    given = mesh(2, 2, names=names)
    assert resolve_mesh(given) is given


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((2, 2), ("dp_shard", "dp_replicate")),
        ((2, 2), ("dp_shard", "tp")),
        ((2, 2), None),
        ((2, 2, 1), ("dp_replicate", "dp_shard", "tp")),
    ],
    ids=str,
)
def test_other_axes_are_refused(world: Any, shape: tuple[int, ...], names: tuple[str, ...] | None) -> None:
    world(4)
    with pytest.raises(ConfigurationError) as caught:
        resolve_mesh(mesh(*shape, names=names))
    message = str(caught.value)
    assert (
        "expected one axis, or two named dp_replicate or dp and dp_shard or fsdp or dp_shard_cp in this order"
        in message
    )
    assert f"got axes {names or 'without names'} of shape {shape}" in message
    assert "device_mesh['dp_replicate', 'dp_shard']" in message


def test_the_part_that_the_message_names_is_taken(world: Any) -> None:
    world(4)
    part = mesh(2, 2, 1, names=("dp_replicate", "dp_shard", "tp"))["dp_replicate", "dp_shard"]
    assert resolve_mesh(part) is part


def test_a_mesh_without_this_rank_is_refused(world: Any) -> None:
    world(4, rank=3)
    given = DeviceMesh("cpu", [0, 1], mesh_dim_names=("dp_shard",))
    with pytest.raises(ConfigurationError) as caught:
        resolve_mesh(given)
    assert str(caught.value) == (
        "device_mesh: expected a mesh that holds this rank (3 of 4), got ranks [0, 1]. Make the strategy only on the "
        "ranks of its mesh."
    )


def test_no_mesh_is_one_shard_axis_over_the_default_group(world: Any) -> None:
    world(4, rank=2)
    made = resolve_mesh(None)
    assert made.mesh_dim_names == ("dp_shard",)
    assert made.mesh.tolist() == [0, 1, 2, 3]
    assert made.device_type == default_device_type()


def test_ranks_are_ascending_and_the_lowest_is_the_source(world: Any) -> None:
    world(6, rank=5)
    given = DeviceMesh("cpu", [[5, 2], [3, 4]], mesh_dim_names=("dp", "fsdp"))
    assert ranks_of(given) == (2, 3, 4, 5)
    assert source_rank_of(given) == 2
    assert source_rank_of(mesh(6)) == 0


def test_the_device_of_cpu_ranks_is_the_cpu(world: Any) -> None:
    world(2)
    assert device_of(mesh(2)) == torch.device("cpu")


def test_a_process_alone_is_a_group_of_one(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    made = resolve_mesh(None)
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    assert tuple(made.shape) == (1,)


def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = dict(os.environ)
    with pytest.raises(ConfigurationError) as caught:
        resolve_mesh(None)
    message = str(caught.value)
    assert "expected an initialised process group for WORLD_SIZE=2, got none" in message
    assert "torchrun or accelerate launch" in message
    assert not dist.is_initialized()
    assert dict(os.environ) == before


@pytest.mark.parametrize("given", [(2,), [0, 1], 2, "cpu"])
def test_what_is_no_mesh_is_refused(given: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        device_type_of(given)
    message = str(caught.value)
    assert message.startswith(
        f"device_mesh: expected a torch DeviceMesh or None, got {given!r}. Make one with "
    )
    assert "init_device_mesh(" in message


@pytest.mark.parametrize("strategy", [sw.NativeFSDPStrategy, sw.AccelerateStrategy])
def test_both_strategies_refuse_it(strategy: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"^device_mesh: expected a torch DeviceMesh or None, got \(2,\)"
    ):
        strategy(device_mesh=(2,))
    assert not dist.is_initialized()
