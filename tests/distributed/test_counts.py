"""What a load costs in calls of the system, copies and allocations: counted, so that it is the same on every machine."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.counting import Counts, counting, values_start_of
from tests.distributed.steps import local_of

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="counts calls that other systems make in other ways"),
]

KIB, MIB = 2**10, 2**20
RANKS, FILES = 2, 2
STAGING_BYTES = MIB  # a quarter of a large tensor's shard
TOLERANCE = 1.02
PYTHON_BYTES, PYTHON_BYTES_PER_TENSOR = MIB, 8 * KIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and how it is loaded."""

    tensors: int
    rows: int
    columns: int
    cpu_storage: str = "copy"
    kept: torch.dtype = torch.float32  # stored in float32
    dim: int = 0  # that is sharded

    @property
    def stored_bytes(self) -> int:
        """Of one rank's shards."""
        return self.tensors * self.rows * self.columns * 4 // RANKS


LARGE = {"tensors": 4, "rows": 2048, "columns": 1024}
SMALL = {"tensors": 512, "rows": 16, "columns": 32}
CASES = {
    "mapped": Case(**LARGE, cpu_storage="auto"),
    "small, mapped": Case(**SMALL, cpu_storage="auto"),
    "copied": Case(**LARGE),
    "cast": Case(**LARGE, kept=torch.bfloat16),
    "columns": Case(**LARGE, dim=1),
    "small, copied": Case(**SMALL),
}


@pytest.fixture(scope="module")
def counted(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Counts]]:
    """Counts of every case, by rank."""
    folder = tmp_path_factory.mktemp("counts")
    for sizes in (LARGE, SMALL):
        write(folder / str(sizes["tensors"]), **sizes)
    return pool.run(count_all, str(folder), ranks=RANKS)


def write(directory: Path, *, tensors: int, rows: int, columns: int) -> None:
    directory.mkdir()
    names = [f"{i}.weight" for i in range(tensors)]
    weight_map = {}
    for number in range(FILES):
        file = f"model-{number}.safetensors"
        save_file({name: torch.randn(rows, columns) for name in names[number::FILES]}, directory / file)
        weight_map |= dict.fromkeys(names[number::FILES], file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)


def count_all(folder: str) -> dict[str, Counts]:
    count(Path(folder), CASES["small, copied"])  # the first load imports modules
    return {name: count(Path(folder), case) for name, case in CASES.items()}


def count(folder: Path, case: Case) -> Counts:
    directory = folder / str(case.tensors)
    with torch.device("meta"):
        layers = (nn.Linear(case.columns, case.rows, bias=False) for _ in range(case.tensors))
        model = nn.Sequential(*layers)
    fully_shard(model, shard_placement_fn=lambda _: Shard(case.dim))
    options: dict[str, Any] = {"cpu_storage": case.cpu_storage, "dtype": case.kept}
    with counting(values_start_of(directory)) as counts:
        report = sw.materialize(model, str(directory), staging_bytes=STAGING_BYTES, **options)
    counts.network_bytes = report.ranks[dist.get_rank()].network_bytes
    locals_ = [local_of(parameter) for parameter in model.parameters()]
    counts.shards = [(local.data_ptr(), local.nbytes) for local in locals_]
    return counts


def each_rank(counted: list[dict[str, Counts]], *names: str) -> list[tuple[Case, Counts]]:
    return [(CASES[name], of_rank[name]) for of_rank in counted for name in names]


def test_mapped_shards_are_pages_of_the_file(counted: list[dict[str, Counts]]) -> None:
    for case, counts in each_rank(counted, "mapped", "small, mapped"):
        assert (counts.copied_bytes, counts.reads, counts.other_allocations) == (0, 0, [])
        assert counts.shard_bytes == case.stored_bytes
        assert len(counts.mapped_ranges) == FILES  # however many tensors
        assert all(any(at in pages for pages in counts.mapped_ranges) for at, _ in counts.shards)


def test_bytes_that_stay_as_they_are_are_copied_once(counted: list[dict[str, Counts]]) -> None:
    for case, counts in each_rank(counted, "copied"):
        assert counts.read_bytes == counts.shard_bytes == case.stored_bytes
        assert counts.copied_bytes <= TOLERANCE * case.stored_bytes
        assert counts.other_allocations == []  # straight into place
        assert counts.reads <= case.stored_bytes // STAGING_BYTES  # the most that one request may have


def test_a_cast_is_one_more_copy_through_staging(counted: list[dict[str, Counts]]) -> None:
    for case, counts in each_rank(counted, "cast"):
        assert counts.read_bytes == case.stored_bytes == 2 * counts.shard_bytes
        assert counts.copied_bytes <= TOLERANCE * (case.stored_bytes + counts.shard_bytes)
        assert 0 < sum(counts.other_allocations) <= STAGING_BYTES
        assert counts.reads <= case.stored_bytes // (STAGING_BYTES // 8)  # a staging buffer each


def test_what_ranks_read_together_is_packed_sent_and_placed(counted: list[dict[str, Counts]]) -> None:
    """Each byte is read and placed once; those of other ranks are packed by the sender and received beside that."""
    for case, counts in each_rank(counted, "columns", "small, copied"):
        from_others = (RANKS - 1) / RANKS
        assert counts.read_bytes == counts.shard_bytes == case.stored_bytes
        assert counts.copied_bytes <= TOLERANCE * (2 + 2 * from_others) * case.stored_bytes
        assert 0 < sum(counts.other_allocations) <= STAGING_BYTES
        extents = -(-case.stored_bytes // (STAGING_BYTES // 5))
        assert counts.reads <= extents + FILES  # a request for each extent, however many tensors are in it


def test_nothing_beside_the_shards_is_larger_than_staging(counted: list[dict[str, Counts]]) -> None:
    for case, counts in each_rank(counted, *CASES):
        assert max(counts.other_allocations, default=0) <= STAGING_BYTES
        # Plans, the header and whatever NumPy holds; of large tensors far less than one shard.
        assert counts.python_peak_bytes <= PYTHON_BYTES + case.tensors * PYTHON_BYTES_PER_TENSOR


def test_files_are_opened_once_by_the_rank_that_describes_them_twice_and_twice_more_to_fetch_pages(
    counted: list[dict[str, Counts]],
) -> None:
    for rank, of_rank in enumerate(counted):
        for name, counts in of_rank.items():
            is_mapped = name.endswith("mapped")
            assert counts.opens <= (1 + (rank == 0) + 2 * is_mapped) * FILES, name
            assert counts.mappings == is_mapped * FILES, name
