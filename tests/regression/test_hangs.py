"""Hangs, and failures that hid their cause: what users saw, by number of the case."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import shardwise as sw
from shardwise.checkpoint import SafetensorsSource
from shardwise.errors import StalledReadError
from shardwise.materialization import data_plane
from shardwise.testing import RankPool
from tests.distributed.models import PlainNet, check_equal, from_checkpoint
from tests.distributed.steps import (
    Checkpoint,
    backward,
    by_efficient,
    by_strategy,
    check_gradients,
    load,
    make_strategy,
    own_rows,
)
from tests.distributed.test_routes import on_node

pytestmark = pytest.mark.distributed


class Experts(nn.Module):
    """Two experts in one tensor, and a router with a bias that is a persistent buffer."""

    def __init__(self, *, sidecar: bool) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 8, 8))
        self.router = nn.Linear(8, 2, bias=False)
        self.router.register_buffer("e_score_correction_bias", torch.rand(2))
        if sidecar:
            self.router.statistics = torch.rand(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.router(x) + self.router.e_score_correction_bias, -1)
        return torch.einsum("be,bd,edo->bo", weights, x, self.experts)


class Mixture(nn.Module):
    def __init__(self, *, sidecar: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Experts(sidecar=sidecar)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


def mixture(*, seed: int, sidecar: bool) -> Mixture:
    torch.manual_seed(seed)
    return Mixture(sidecar=sidecar)


@by_strategy
@by_efficient
def test_case_33_more_ranks_than_experts(pool: RankPool, strategy: str, efficient: bool) -> None:
    """Empty shards made some ranks crash and the others hang."""
    pool.run(train_experts, strategy, efficient, False, ranks=4)


@by_strategy
@by_efficient
def test_case_36_37_a_persistent_router_bias_and_keys_that_only_rank_0_has(
    pool: RankPool, strategy: str, efficient: bool
) -> None:
    """Rank 0 paired tensors by position and the others by name; a buffer was taken for a parameter."""
    pool.run(train_experts, strategy, efficient, True, ranks=3)


def train_experts(name: str, efficient: bool, sidecar: bool) -> None:
    strategy = make_strategy(name, memory_efficient_init=efficient)
    model = mixture(seed=dist.get_rank() if efficient else 0, sidecar=sidecar and dist.get_rank() == 0)
    model = strategy.wrap_model(model)
    check_step(model, lambda loss: backward(strategy, loss))


def check_step(model: nn.Module, run_backward: Callable[[torch.Tensor], None]) -> None:
    inputs = torch.randn(2 * dist.get_world_size(), 8, generator=torch.Generator().manual_seed(5))
    reference = mixture(seed=0, sidecar=False)
    check_equal(model, reference)
    assert "layers.0.router.e_score_correction_bias" in model.state_dict()
    run_backward(model(own_rows(inputs)).square().mean())
    reference(inputs).square().mean().backward()
    check_gradients(model, reference)


@pytest.mark.parametrize("cpu_storage", ["map", "copy"])
def test_case_33_37_experts_and_a_router_bias_are_read_by_their_ranks(
    pool: RankPool, tmp_path: Path, cpu_storage: str
) -> None:
    """The same from files: two ranks of four have no rows of the experts, and the bias is a tensor of the file."""
    save_file(mixture(seed=0, sidecar=False).state_dict(), tmp_path / "model.safetensors")
    pool.run(read_experts, str(tmp_path), cpu_storage, ranks=4)


def read_experts(directory: str, cpu_storage: str) -> None:
    with torch.device("meta"):
        model = Mixture(sidecar=False)
    fully_shard(model.layers[0])
    fully_shard(model)
    report = sw.materialize(model, directory, cpu_storage=cpu_storage)
    assert report.origins["layers.0.router.e_score_correction_bias"] == "checkpoint"
    check_step(model, torch.Tensor.backward)


def test_case_34_35_slow_storage_outlasts_the_groups_timeout_but_not_the_users(
    pool: RankPool, tmp_path: Path
) -> None:
    """Fast ranks died on the watchdog, or at a store's own wait, although a longer timeout had been given."""
    torch.manual_seed(0)
    save_file({"weight": torch.randn(64, 512)}, tmp_path / "model.safetensors")
    pool.run(read_slowly, str(tmp_path), 0, 20.0, ranks=3)
    pool.run(read_slowly, str(tmp_path), 1, 20.0, ranks=3)
    pool.run(read_slowly, str(tmp_path), 1, 20.0, "connecting", ranks=3)  # the communicator has it too
    # A rank that waits gives up a quarter of the timeout after the reader: that much a busy machine may be late.
    errors = pool.run_to_errors(read_slowly, str(tmp_path), 0, 8.0, "reading", 15.0, ranks=3)
    for rank, error in enumerate(errors):
        assert isinstance(error, StalledReadError if rank == 2 else sw.PeerError)
        assert "model.safetensors: reading" in str(error)
        assert "has not returned for 6 s on rank 2 (" in str(error)


def read_slowly(
    directory: str, dim: int, timeout: float, slow_at: str = "reading", seconds: float = 1.6
) -> None:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Linear(512, 64, bias=False, device="meta")
    model.weight = nn.Parameter(distribute_tensor(model.weight.data, mesh, [Shard(dim)], src_data_rank=None))
    place: tuple[Any, str] = (SafetensorsSource, "read_scattered")
    if slow_at == "connecting":
        place = data_plane, "make_group"
    original = getattr(*place)

    def slow(*args: Any, **options: Any) -> Any:
        if dist.get_rank() == 2:
            time.sleep(seconds)
        return original(*args, **options)

    with mock.patch.object(*place, slow):
        sw.materialize(model, directory, timeout=timeout, cpu_storage="copy")
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=30), dist.group.WORLD)
    assert model.weight.full_tensor().isfinite().all()


@by_strategy
@pytest.mark.parametrize("failing", [0, 2])
def test_case_38_every_rank_prints_the_first_failure(pool: RankPool, strategy: str, failing: int) -> None:
    """A communication error hid the exception that had come first."""
    errors = pool.run_to_errors(fail_in_unit, strategy, failing, ranks=4, timeout_seconds=60)
    check_first_failure(errors, failing, ValueError, "expert 3 is not a number")


def check_first_failure(
    errors: list[BaseException | None], failing: int, kind: type[BaseException], text: str
) -> None:
    assert isinstance(errors[failing], kind)
    for rank, error in enumerate(errors):
        assert text in str(error)
        if rank != failing:
            assert isinstance(error, sw.PeerError), error
            assert f"rank {failing} on " in str(error)


def fail_in_unit(name: str, failing: int) -> None:
    def policy(module: nn.Module) -> bool:
        if dist.get_rank() == failing:
            raise ValueError("expert 3 is not a number")
        return isinstance(module, nn.Linear)

    make_strategy(name, fsdp_config={"auto_wrap_policy": policy}).wrap_model(PlainNet())


@by_strategy
@pytest.mark.parametrize("failing", [0, 2])
def test_case_38_every_rank_names_the_file_that_one_cannot_read(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, failing: int
) -> None:
    errors = pool.run_to_errors(
        fail_in_read, checkpoint("qwen3_tied"), strategy, failing, ranks=4, timeout_seconds=60
    )
    check_first_failure(errors, failing, OSError, "model.safetensors: no such share")


def fail_in_read(directory: str, name: str, failing: int) -> None:
    original = SafetensorsSource.read_scattered

    def broken(self: SafetensorsSource, file: str, offset: int, parts: Any) -> None:
        if dist.get_rank() == failing:
            raise OSError(f"{file}: no such share")
        original(self, file, offset, parts)

    strategy = make_strategy(name, cpu_storage="copy")
    model = load(strategy, directory, defer=True)
    SafetensorsSource.read_scattered = broken  # type: ignore[method-assign]
    try:
        strategy.wrap_model(model)
    finally:
        SafetensorsSource.read_scattered = original  # type: ignore[method-assign]


ROWS = (1, 17, 31)


def row_model(rows: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, rows), nn.Linear(rows, 3))


@by_strategy
def test_case_39_dim_0_that_no_number_of_ranks_divides(pool: RankPool, strategy: str) -> None:
    """Loading failed where dim 0 does not divide."""
    pool.run(wrap_rows, strategy, ranks=4)


def wrap_rows(name: str) -> None:
    for rows in ROWS:
        model = make_strategy(name).wrap_model(row_model(rows, dist.get_rank()))
        check_equal(model, row_model(rows, 0))


def test_case_39_such_rows_are_read_from_files(pool: RankPool, tmp_path: Path) -> None:
    for rows in ROWS:
        save_file(row_model(rows, 0).state_dict(), tmp_path / f"{rows}.safetensors")
    pool.run(read_rows, str(tmp_path), ranks=4)


def read_rows(directory: str) -> None:
    for rows in ROWS:
        for cpu_storage in ("auto", "copy"):
            model = row_model(rows, 1).to("meta")
            fully_shard(model)
            sw.materialize(model, f"{directory}/{rows}.safetensors", cpu_storage=cpu_storage)
            check_equal(model, row_model(rows, 0))


def test_case_40_61_all_ranks_run_the_same_collectives(pool: RankPool, checkpoint: Checkpoint) -> None:
    """Local first ranks reduced while the others broadcast; ranks scattered what each of them could read itself."""
    for way, nodes in (("direct", 1), ("direct", 2), ("rank0", 2), ("node", 2)):
        sequences = pool.run(collectives_of_load, checkpoint("qwen3_tied"), way, nodes, ranks=4)
        assert all(sequence == sequences[0] for sequence in sequences), (way, nodes)
        assert bool(sequences[0]) == (way != "direct")


def collectives_of_load(directory: str, way: str, nodes: int) -> list[str]:
    calls: list[str] = []
    names = ("scatter", "broadcast", "all_gather", "all_reduce", "all_to_all_single", "barrier", "new_group")
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        with on_node(dist.get_rank() * nodes // dist.get_world_size()):
            strategy = make_strategy("native_fsdp", route="node" if way == "node" else "auto")
            model = strategy.wrap_model(load(strategy, directory, defer=way != "rank0"))
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    check_equal(model, from_checkpoint(directory))
    return calls
