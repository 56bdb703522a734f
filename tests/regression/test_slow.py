"""Loads that read or moved more than they had to: what users saw, by number of the case."""

from __future__ import annotations

import json
import mmap
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.checkpoint import Run, SafetensorsSource, ranged_file, safetensors_source
from shardwise.testing import RankPool
from tests.distributed.models import PlainNet, check_equal
from tests.distributed.steps import by_efficient, by_strategy, every_rank, make_strategy
from tests.distributed.test_routes import on_node

pytestmark = pytest.mark.distributed

MIB = 2**20


class Requests:
    """What a source was asked for: bytes of each read and mapping, and the file at each opening."""

    def __init__(self) -> None:
        self.reads: list[int] = []
        self.mappings: list[int] = []
        self.opened: list[str] = []


@contextmanager
def counted() -> Iterator[Requests]:
    """Count requests of this rank below everything that a report could get wrong."""
    requests = Requests()
    read_scattered, mapped = SafetensorsSource.read_scattered, SafetensorsSource.mapped

    def reading(self: Any, file: str, offset: int, parts: Any) -> None:
        requests.reads.append(sum(map(len, parts)))
        read_scattered(self, file, offset, parts)

    def mapping(self: Any, runs: Sequence[Run]) -> list[torch.Tensor | None]:
        found = mapped(self, runs)
        requests.mappings += [tensor.nbytes for tensor in found if tensor is not None]
        return found

    class Opening(ranged_file.RangedFile):
        def __init__(self, path: Path, **options: Any) -> None:
            requests.opened.append(path.name)
            super().__init__(path, **options)

    SafetensorsSource.read_scattered, SafetensorsSource.mapped = reading, mapping  # type: ignore[method-assign]
    original, safetensors_source.RangedFile = safetensors_source.RangedFile, Opening  # type: ignore[misc]
    try:
        yield requests
    finally:
        SafetensorsSource.read_scattered, SafetensorsSource.mapped = read_scattered, mapped  # type: ignore[method-assign]
        safetensors_source.RangedFile = original  # type: ignore[misc]


# --- storage ---


@pytest.mark.parametrize("cpu_storage", ["map", "copy"])
def test_case_56_60_the_job_requests_the_checkpoint_once_and_no_rank_more_than_its_part(
    pool: RankPool, tmp_path: Path, cpu_storage: str
) -> None:
    """Every node read everything in small pieces; then one rank read for all, and was what the others waited for."""
    torch.manual_seed(0)
    sizes = {"weight": (1021, 512), "bias": (1021,)}
    values = {f"{i}.{kind}": torch.randn(size) for i in range(4) for kind, size in sizes.items()}
    save_file(values, tmp_path / "model.safetensors")
    whole = sum(value.nbytes for value in values.values())
    results = pool.run(count_bytes, str(tmp_path), cpu_storage, ranks=4)
    assert whole <= sum(nbytes for nbytes, _ in results) <= 1.02 * whole
    for nbytes, reads in results:
        assert nbytes <= 1.02 * whole / 4
        assert reads <= 8  # one per tensor, not one per row


def count_bytes(directory: str, cpu_storage: str) -> tuple[int, int]:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(512, 1021) for _ in range(4)))
    fully_shard(model)
    with counted() as requests:
        report = sw.materialize(model, directory, cpu_storage=cpu_storage)
    own = sum(requests.reads) + sum(requests.mappings)
    assert report.storage_bytes == sum(every_rank(own))
    assert report.network_bytes == 0
    # The last rank's shard is short, so that it is padded and cannot be the file's pages.
    assert bool(requests.mappings) == (cpu_storage == "map" and dist.get_rank() < 3)
    return own, len(requests.reads) + len(requests.mappings)


@pytest.mark.parametrize(("route", "nodes"), [("node", 2), ("striped", 1)])
def test_case_60_no_rank_sends_for_the_whole_job(
    pool: RankPool, tmp_path: Path, route: str, nodes: int
) -> None:
    """One rank read, and sent, for all; then each node's first rank for its node, or each rank a part."""
    torch.manual_seed(0)
    save_file({f"{i}.weight": torch.randn(1024, 512) for i in range(4)}, tmp_path / "model.safetensors")
    whole = 4 * 1024 * 512 * 4
    sent = pool.run(count_egress, str(tmp_path), route, nodes, ranks=4)
    if route == "node":  # a reader keeps its own fourth, and sends the other rank of its node one
        assert [nbytes > 0 for nbytes in sent] == [True, False, True, False]
        assert sum(sent) <= 0.52 * whole
    assert max(sent) <= 0.3 * whole


def count_egress(directory: str, route: Any, nodes: int) -> int:
    sent, rank = [0], dist.get_rank()
    scatter, all_to_all = dist.scatter, dist.all_to_all_single

    def scattering(into: torch.Tensor, slots: Any = None, *args: Any, **options: Any) -> Any:
        sent[0] += (len(slots) - 1) * into.nbytes if slots else 0
        return scatter(into, slots, *args, **options)

    def exchanging(
        receive: torch.Tensor, send: torch.Tensor, receives: Any, sends: Any, **options: Any
    ) -> Any:
        own = dist.get_group_rank(options["group"], rank)
        sent[0] += sum(sends) - sends[own]
        return all_to_all(receive, send, receives, sends, **options)

    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(512, 1024, bias=False) for _ in range(4)))
    fully_shard(model)
    dist.scatter, dist.all_to_all_single = scattering, exchanging  # type: ignore[assignment]
    try:
        with on_node(rank * nodes // dist.get_world_size()):
            sw.materialize(model, directory, route=route, cpu_storage="copy", staging_bytes=4 * 2**20)
    finally:
        dist.scatter, dist.all_to_all_single = scatter, all_to_all
    assert model[3].weight.full_tensor().std() > 0.9
    return sent[0]


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs /proc, and a page cache that can be told to forget"
)
def test_case_57_a_cold_file_is_read_and_not_faulted_in(pool: RankPool, tmp_path: Path) -> None:
    """Pages of mapped files were faulted in one after the other, at 28 MiB/s."""
    save_file({f"{i}.weight": torch.randn(2048, 1024) for i in range(4)}, tmp_path / "model.safetensors")
    part = 4 * 2048 * 1024 * 4 // 2
    for reads, is_mapped, touching, loading in pool.run(load_cold, str(tmp_path), ranks=2):
        assert not any(is_mapped)
        assert sum(reads) >= part  # all that this rank has is what the system was asked to read
        assert sum(nbytes for nbytes in reads if nbytes >= MIB) >= 0.99 * part
        # A few pages of code may come back meanwhile. A system that keeps what it is told to forget counts nothing.
        assert touching < 32 or loading < 32


def load_cold(directory: str) -> tuple[list[int], list[bool], int, int]:
    """Load a cold file.

    Returns:
        The bytes of each read of it, whether a part of it was mapped at each of these times and after the load, and the major
        faults of this process while all touch 128 of its pages, and while it loads.
    """
    path = (Path(directory) / "model.safetensors").resolve()
    load(directory)  # what a first call brings into memory would count
    before = forget(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        mapped.madvise(mmap.MADV_RANDOM)  # no reading ahead
        sum(mapped[:: 64 * mmap.PAGESIZE])
    touching = major_faults() - before
    reads: list[int] = []
    is_mapped: list[bool] = []
    preadv = os.preadv

    def noted(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        got = preadv(descriptor, buffers, offset, flags)
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(path) and not flags:
            reads.append(got)
            is_mapped.append(str(path) in Path("/proc/self/maps").read_text())
        return got

    before = forget(path)
    with mock.patch.object(os, "preadv", noted):
        load(directory)
    loading = major_faults() - before
    return reads, [*is_mapped, str(path) in Path("/proc/self/maps").read_text()], touching, loading


def load(directory: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1024, 2048, bias=False) for _ in range(4)))
    fully_shard(model)
    sw.materialize(model, directory, cpu_storage="copy")
    assert model[0].weight.to_local().std() > 0.9


def forget(path: Path) -> int:
    dist.barrier()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()
    return major_faults()


def major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def test_case_59_a_rank_opens_the_files_that_it_reads_and_one_rank_reads_the_headers(
    pool: RankPool, tmp_path: Path
) -> None:
    """512 ranks contended for the same files, also in a mode that was named after rank 0."""
    torch.manual_seed(0)
    for part, rows in enumerate((1, 7, 2)):
        save_file({f"{part}.weight": torch.randn(rows, 4)}, tmp_path / f"{part}.safetensors")
    index = {"weight_map": {f"{part}.weight": f"{part}.safetensors" for part in range(3)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    headers = [f"{part}.safetensors" for part in range(3)]
    assert (
        pool.run(trace_files, str(tmp_path), ranks=3)
        == [
            sorted(headers * 2),  # the first rank has rows of each
            headers[1:],  # one row in three: nothing for the second rank
            headers[1:2],
        ]
    )


def trace_files(directory: str) -> list[str]:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(4, rows, bias=False) for rows in (1, 7, 2)))
    fully_shard(model)
    with counted() as requests:
        sw.materialize(model, directory, cpu_storage="copy")
    return sorted(requests.opened)


def test_case_62_many_small_tensors_are_few_reads(pool: RankPool, tmp_path: Path) -> None:
    """A mixture of experts was slow to load for its very many tensors."""
    torch.manual_seed(0)
    values = {f"{i}.weight": torch.randn(8, 16) for i in range(600)}
    save_file(values, tmp_path / "model.safetensors")
    results = pool.run(fill_many, str(tmp_path), 600, ranks=3)
    whole = sum(value.nbytes for value in values.values())
    assert sum(sum(reads) for reads in results) <= 1.02 * whole
    assert all(len(reads) <= 5 for reads in results)


def fill_many(directory: str, count: int) -> list[int]:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(16, 8, bias=False) for _ in range(count)))
    fully_shard(model)
    with counted() as requests:
        sw.materialize(model, directory, cpu_storage="copy")
    whole = load_file(Path(directory) / "model.safetensors")
    for index in (0, 17, count - 1):
        assert torch.equal(model[index].weight.full_tensor(), whole[f"{index}.weight"])
    return requests.reads


# --- collectives ---


@by_strategy
@by_efficient
def test_case_61_one_rank_moves_no_data(pool: RankPool, strategy: str, efficient: bool) -> None:
    """A scatter that nobody needed took 10 to 23 % of the start-up."""
    pool.run(wrap_alone, strategy, efficient, ranks=1)


def wrap_alone(name: str, efficient: bool) -> None:
    calls: list[str] = []
    c10d = dist.distributed_c10d
    watched = ("scatter", "broadcast", "all_gather", "all_reduce", "_new_process_group_helper")
    originals = {function: getattr(c10d, function) for function in watched}
    strategy = make_strategy(name, memory_efficient_init=efficient)
    for module in (dist, c10d):
        for function in watched:
            if hasattr(module, function):
                setattr(module, function, lambda *args, _function=function, **kwargs: calls.append(_function))
    try:
        model = strategy.wrap_model(PlainNet())
    finally:
        for module in (dist, c10d):
            for function, original in originals.items():
                if hasattr(module, function):
                    setattr(module, function, original)
    assert calls == []
    check_equal(model, PlainNet())
    assert strategy.last_report.network_bytes == 0


def test_case_61_several_ranks_move_each_byte_once(pool: RankPool) -> None:
    """No collective but the scatters, and these carry the plan's bytes and no others; one byte shows that all are connected."""
    for calls, planned in pool.run(count_collectives, ranks=4):
        assert calls.pop("all_reduce") == [1]
        assert set(calls) == {"scatter"}
        assert sum(calls["scatter"]) <= planned + 16 * 100 * 4  # alignment of small pieces


def count_collectives() -> tuple[dict[str, list[int]], int]:
    calls: dict[str, list[int]] = {}
    originals = {name: getattr(dist, name) for name in ("scatter", "broadcast", "all_gather", "all_reduce")}

    def counting(function: str) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.setdefault(function, []).append(tensor.nbytes)
            return originals[function](tensor, *args, **kwargs)

        return call

    strategy = make_strategy("native_fsdp")
    for name in originals:
        setattr(dist, name, counting(name))
    try:
        strategy.wrap_model(PlainNet(seed=dist.get_rank()))
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    own = max(every_rank(json.loads(json.dumps(strategy.last_report.ranks[dist.get_rank()].network_bytes))))
    return calls, own
