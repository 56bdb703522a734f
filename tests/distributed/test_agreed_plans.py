"""Ranks plan from the same data: layouts on submeshes are joined, and what differs is named before anything is read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import shardwise as sw
from shardwise.errors import CheckpointError, PeerError, RankMismatchError
from shardwise.testing import RankPool
from tests.distributed.steps import every_rank, local_of

pytestmark = pytest.mark.distributed

COUNT = 100  # small tensors, enough of them in a row to be exchanged
TIMEOUT_SECONDS = 60.0
PROMPT_SECONDS = 20.0


@pytest.fixture(scope="module")
def many_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many small tensors, and one large enough to be read by its owners."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("many")
    values = {f"{i}.weight": torch.randn(8, 16) for i in range(COUNT)}
    save_file(values, directory / "model.safetensors")
    return directory


def many(*, device: str = "meta") -> nn.Sequential:
    with torch.device(device):
        return nn.Sequential(*(nn.Linear(16, 8, bias=False) for _ in range(COUNT)))


def values_of(directory: str) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "model.safetensors")


# --- submeshes ---


@pytest.mark.parametrize("cpu_storage", ["map", "copy"])
@pytest.mark.parametrize("kind", ["files", "state dict"])
def test_a_model_on_a_submesh_of_each_rank(
    pool: RankPool, many_checkpoint: Path, cpu_storage: str, kind: str
) -> None:
    if kind == "state dict":
        cpu_storage = "copy"
    read = pool.run(fill_on_submesh, str(many_checkpoint), cpu_storage, kind, ranks=4)
    whole = sum(value.nbytes for value in values_of(str(many_checkpoint)).values())
    if kind == "files" and cpu_storage == "copy":
        assert set(read) == {whole}  # once in the job, not once for each copy of the model


def fill_on_submesh(directory: str, cpu_storage: Any, kind: str) -> int:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "fsdp"))
    model = many()
    fully_shard(model, mesh=mesh["fsdp"])
    whole = values_of(directory)
    checkpoint: Any = directory if kind == "files" else whole if dist.get_rank() == 0 else {}
    report = sw.materialize(model, checkpoint, cpu_storage=cpu_storage, timeout=TIMEOUT_SECONDS)
    for index in range(COUNT):
        assert torch.equal(model[index].weight.full_tensor(), whole[f"{index}.weight"]), index
    assert sw.verify_shards(model, directory, timeout=TIMEOUT_SECONDS).is_equal
    return report.storage_bytes


class Block(nn.Module):
    """Two projections for tensor parallelism and a norm that stays whole."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)


def blocks() -> nn.Sequential:
    return nn.Sequential(*(Block(16) for _ in range(40)))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_tensor_parallelism_with_many_small_tensors_on_the_other_axis(
    pool: RankPool, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    values = {name: torch.randn_like(value) for name, value in blocks().state_dict().items()}
    save_file(values, tmp_path / "model.safetensors")
    pool.run(fill_two_axes, str(tmp_path), dtype, ranks=4)


def fill_two_axes(directory: str, dtype: torch.dtype | None) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    with torch.device("meta"):
        model = blocks()
    for block in model:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["fsdp"])
    fully_shard(model, mesh=mesh["fsdp"])
    sw.materialize(model, directory, dtype=dtype, cpu_storage="copy", timeout=TIMEOUT_SECONDS)
    fsdp, tp = mesh["fsdp"].get_local_rank(), mesh["tp"].get_local_rank()
    whole = values_of(directory)
    for name, parameter in model.named_parameters():
        own = whole[name].chunk(2)[tp] if ".up." in name else whole[name]
        own = own.chunk(2, 1)[tp] if ".down." in name else own
        assert torch.equal(local_of(parameter), own.chunk(2)[fsdp].to(parameter.dtype)), name


def test_layouts_that_do_not_fit_together_are_refused(pool: RankPool, many_checkpoint: Path) -> None:
    errors = pool.run_to_errors(shard_on_two_ranks_only, str(many_checkpoint), ranks=3)
    assert {type(error) for error in errors} == {RankMismatchError}
    assert "0.weight: expected one layout on all ranks, or meshes of one shape" in str(errors[0])
    assert "fill the parts in calls of their own with group=" in str(errors[2])


def shard_on_two_ranks_only(directory: str) -> None:
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("fsdp",))
    model = many()
    if dist.get_rank() < 2:
        fully_shard(model, mesh=mesh)
    sw.materialize(model, directory, timeout=TIMEOUT_SECONDS)


# --- what differs between ranks is named before their ways part ---


def run_with_difference(directory: str, what: str) -> float:
    is_first = dist.get_rank() == 0
    model, checkpoint, options = many(), directory, {}
    fully_shard(model)
    if what == "storage" and is_first:
        model.to_empty(device="cpu")
    if what == "staging":
        options["staging_bytes"] = 65_536 if is_first else 4096
    if what == "missing":
        options["missing"] = "init" if is_first else "error"
    if what == "rename":
        options["rename"] = (
            None if is_first else (lambda name: name.replace("0.", "1.") if name == "0.weight" else name)
        )
    if what == "kind":
        checkpoint = directory if is_first else None  # type: ignore[assignment]
    if what == "source":
        checkpoint = Named("0" if is_first else "1")  # type: ignore[assignment]
    started = time.monotonic()
    try:
        sw.materialize(model, checkpoint, timeout=TIMEOUT_SECONDS, **options)  # type: ignore[arg-type]
    finally:
        assert time.monotonic() - started < PROMPT_SECONDS
    return time.monotonic() - started


class Named:
    """A source of one user: each rank's file has another name."""

    def __init__(self, file: str) -> None:
        from shardwise.checkpoint import StoredTensor

        self.name = "mine"
        self.tensors = {
            f"{i}.weight": StoredTensor(
                name=f"{i}.weight",
                shape=(8, 16),
                dtype=torch.float32,
                file=file,
                start=i * 512,
                stop=(i + 1) * 512,
            )
            for i in range(COUNT)
        }

    def read_into(self, file: str, offset: int, into: memoryview) -> None:
        into[:] = bytes(len(into))

    def mapped(self, file: str, offset: int, *, dtype: torch.dtype, numel: int) -> None:
        return None

    def require_unchanged(self) -> None:
        """Nothing to compare with."""

    def close(self) -> None:
        """Nothing to close."""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("storage", "expected 0.weight has storage; 1.weight has storage"),
        ("staging", "expected option staging_bytes: 65536, got option staging_bytes: 4096"),
        ("missing", "expected option missing: init, got option missing: error"),
        ("rename", "what is to be read on rank 1 is not that of rank 0: expected 0.weight"),
        ("kind", "expected option checkpoint: a path or hub id, got option checkpoint: None"),
        ("source", "what is to be read on rank 1 is not that of rank 0"),
    ],
)
def test_a_difference_is_named_on_every_rank(
    pool: RankPool, many_checkpoint: Path, what: str, message: str
) -> None:
    errors = pool.run_to_errors(run_with_difference, str(many_checkpoint), what, ranks=2)
    assert [type(error) for error in errors] == [RankMismatchError] * 2
    assert all(message in str(error) for error in errors), str(errors[0])


@pytest.mark.parametrize("others", ["None", "empty", "their own"])
def test_of_a_state_dict_the_first_rank_is_enough(pool: RankPool, many_checkpoint: Path, others: str) -> None:
    pool.run(fill_from_first, str(many_checkpoint), others, ranks=2)


def fill_from_first(directory: str, others: str) -> None:
    model = many()
    fully_shard(model)
    whole = values_of(directory)
    of_others: Any = {"None": None, "empty": {}, "their own": {"x": torch.zeros(1)}}[others]
    report = sw.materialize(model, whole if dist.get_rank() == 0 else of_others, timeout=TIMEOUT_SECONDS)
    assert report.route == "rank0"
    for index in range(COUNT):
        assert torch.equal(model[index].weight.full_tensor(), whole[f"{index}.weight"])


# --- errors between the phases ---


def test_a_read_error_before_an_exchange_is_told_at_once(pool: RankPool, tmp_path: Path) -> None:
    values = {f"small.{i}.weight": torch.randn(8, 16) for i in range(COUNT)}
    save_file({"big": torch.randn(1000, 400), **values}, tmp_path / "model.safetensors")
    seconds = pool.run(fail_to_read_on_rank_1, str(tmp_path), ranks=2)
    assert max(seconds) < PROMPT_SECONDS


def fail_to_read_on_rank_1(directory: str) -> float:
    from shardwise.checkpoint import SafetensorsSource

    with torch.device("meta"):
        model = nn.Module()
        model.big = nn.Parameter(torch.empty(1000, 400))
        model.small = many()
    fully_shard(model)
    original = SafetensorsSource.read_scattered

    def failing(self: Any, file: str, offset: int, parts: Any) -> None:
        if dist.get_rank() == 1:
            raise CheckpointError("the disk is gone")
        original(self, file, offset, parts)

    SafetensorsSource.read_scattered = failing  # type: ignore[method-assign]
    started = time.monotonic()
    try:
        with pytest.raises(CheckpointError if dist.get_rank() == 1 else PeerError, match="the disk is gone"):
            sw.materialize(model, directory, cpu_storage="copy", timeout=90)
    finally:
        SafetensorsSource.read_scattered = original  # type: ignore[method-assign]
    every_rank(0.0)
    return time.monotonic() - started


# --- buffers that are a rank's own ---


class Counting(nn.Module):
    """A weight, and a counter of this rank's own steps that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))
        self.register_buffer("steps", torch.zeros(1), persistent=False)


@pytest.mark.parametrize("given", ["nothing", "a function"])
def test_counters_of_each_rank_stay_on_a_reload(pool: RankPool, tmp_path: Path, given: str) -> None:
    save_file({"weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    if given == "nothing":
        assert pool.run(reload_with_counter, str(tmp_path), False, ranks=2) == [0.0, 1.0]
    else:  # what the user gives must be equal
        errors = pool.run_to_errors(reload_with_counter, str(tmp_path), True, ranks=2)
        assert [type(error) for error in errors] == [RankMismatchError] * 2
        assert "they differ in steps" in str(errors[0])


def reload_with_counter(directory: str, gives: bool) -> float:
    model = Counting()
    fully_shard(model)
    rank = float(dist.get_rank())
    model.steps += rank
    buffers = (lambda fqn, tensor: torch.full((1,), rank)) if gives else None
    sw.materialize(model, directory, buffers=buffers, timeout=TIMEOUT_SECONDS)
    return float(model.steps.item())
