"""Threads, descriptors and staging buffers after loads that went well, on every route, and after failed ones."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.checkpoint.ranged_file import RangedFile
from shardwise.materialization.data_plane import DataPlane
from shardwise.materialization.lifeline import Lifeline
from shardwise.materialization.staging import StagingRing
from shardwise.testing import RankPool
from tests.distributed.steps import connected_ranks, every_rank

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="descriptors are counted in /proc"),
]

FROM_FILES = ("direct", "replicate", "node", "rank0", "striped")
ROUTES = (*FROM_FILES, "state dict", "source rank")
RANKS, LOADS = 4, 2
SECONDS_TO_CLOSE = 20.0  # gloo closes connections on a thread of its own


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two files, in another dtype than the model, so that everything passes through staging."""
    directory = tmp_path_factory.mktemp("left")
    torch.manual_seed(0)
    for number in range(2):
        values = {f"{number}.weight": torch.randn(64, 64).bfloat16()}
        save_file(values, directory / f"{number}.safetensors")
    return str(directory)


def hsdp() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))


def fill(directory: str, route: str, mesh: DeviceMesh) -> None:
    """Load once and forget the model. The mesh, whose groups are the user's, stays."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(2)))
    if route == "source rank":
        if dist.get_rank() == 0:
            model = model.to_empty(device="cpu")
            model.load_state_dict({k: v.float() for k, v in values_of(directory).items()})
        strategy = sw.NativeFSDPStrategy(device_mesh=mesh, mixed_precision="no", timeout=60)
        model = strategy.wrap_model(model)
    else:
        fully_shard(model, mesh=mesh)
        checkpoint: Any = directory
        if route == "state dict":
            checkpoint = values_of(directory) if dist.get_rank() == 0 else None
        sw.materialize(
            model,
            checkpoint,
            route="auto" if route == "state dict" else route,
            dtype=torch.float32,
            cpu_storage="copy",
            timeout=60,
        )
    for name, value in values_of(directory).items():
        assert torch.equal(model.get_parameter(name).full_tensor(), value.float()), name


def values_of(directory: str) -> dict[str, torch.Tensor]:
    return {name: value for path in Path(directory).iterdir() for name, value in load_file(path).items()}


def ours() -> list[Any]:
    """Return our buffers and groups that are still referred to."""
    gc.collect()
    return [
        each for each in gc.get_objects() if isinstance(each, (StagingRing, DataPlane, RangedFile, Lifeline))
    ]


def left(earlier: weakref.WeakSet[Any]) -> tuple[list[str], int, int]:
    """Return our threads, the number of descriptors, and how many of our objects there are beside earlier ones."""
    objects = sum(each not in earlier for each in ours())
    threads = sorted(t.name for t in threading.enumerate() if t.name.startswith("shardwise"))
    return threads, len(os.listdir("/proc/self/fd")), objects


def settled(before: tuple[list[str], int, int], earlier: weakref.WeakSet[Any]) -> tuple[list[str], int, int]:
    """Return what is there once it is no more than before; what earlier tests have left may have gone meanwhile."""
    deadline = time.monotonic() + SECONDS_TO_CLOSE
    while True:
        threads, descriptors, objects = left(earlier)
        found = threads, max(descriptors, before[1]), max(objects, before[2])
        if found == before or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def growth(once: Callable[[], None]) -> tuple[Any, Any]:
    """Return what is there before and after some loads; the first one of a process opens what torch keeps."""
    earlier = weakref.WeakSet(ours())  # what other tests have left is no matter of this one
    with connected_ranks():
        once()
        every_rank(None)
        before = left(earlier)
        for _ in range(LOADS):
            once()
        every_rank(None)
    return (before[0], before[1], 0), settled((before[0], before[1], 0), earlier)


def load_again_and_again(directory: str, route: str) -> tuple[Any, Any]:
    mesh = hsdp()
    return growth(lambda: fill(directory, route, mesh))


@pytest.mark.parametrize("route", ROUTES)
def test_after_success(pool: RankPool, files: str, route: str) -> None:
    for before, after in pool.run(load_again_and_again, files, route, ranks=RANKS):
        assert before[0] == []
        assert after == before


def fail_again_and_again(directory: str, route: str) -> tuple[Any, Any]:
    mesh, original = hsdp(), RangedFile.read_scattered

    def broken(self: RangedFile, offset: int, parts: Any) -> None:
        if threading.current_thread().name.startswith("shardwise-read"):
            raise sw.CheckpointError(f"{self.path}: cut short")
        original(self, offset, parts)

    def once() -> None:
        with (
            mock.patch.object(RangedFile, "read_scattered", broken),
            pytest.raises(sw.ShardwiseError, match="cut short"),
        ):
            fill(directory, route, mesh)

    return growth(once)


@pytest.mark.parametrize("route", FROM_FILES)
def test_after_failure(pool: RankPool, files: str, route: str) -> None:
    for before, after in pool.run(fail_again_and_again, files, route, ranks=RANKS):
        assert before[0] == []
        assert after == before


_meshes: list[weakref.ref[DeviceMesh]] = []  # of earlier runs in this process


def use_a_mesh(directory: str) -> None:
    mesh = hsdp()
    fill(directory, "direct", mesh)
    _meshes.append(weakref.ref(mesh))


def meshes_used_and_left() -> tuple[int, int]:
    return len(_meshes), sum(mesh() is not None for mesh in _meshes)


def test_a_mesh_goes_with_its_run(pool: RankPool, files: str) -> None:
    """It keeps its groups, and these threads and connections: after some hundred runs a process would have no descriptor left."""
    pool.run(use_a_mesh, files, ranks=RANKS)
    for used, kept in pool.run(meshes_used_and_left, ranks=RANKS):
        assert used > 0
        assert kept == 0
