"""The one progress line of a job: what it says, on whose terminal, and silence elsewhere."""

from __future__ import annotations

import io
import re
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.checkpoint import SafetensorsSource
from shardwise.testing import RankPool

pytestmark = pytest.mark.distributed

TENSORS, MIB = 8, 2**20


class Terminal(io.StringIO):
    """Standard error that is a terminal, or says that it is none."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """16 MiB in eight tensors: 1 MiB of each for each of two ranks."""
    directory = tmp_path_factory.mktemp("progress")
    save_file({f"{i}.weight": torch.ones(1024, 512) for i in range(TENSORS)}, directory / "model.safetensors")
    return str(directory)


def fill_slowly(directory: str, is_terminal: bool, progress: bool | None, seconds_per_read: float) -> str:
    """Return what was written to standard error, without its colours; rank 1 reads at half the speed."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(512, 1024, bias=False) for _ in range(TENSORS)))
    fully_shard(model)
    original = SafetensorsSource.read_scattered

    def slowly(self: SafetensorsSource, file: str, offset: int, parts: Any) -> None:
        time.sleep(seconds_per_read * (dist.get_rank() + 1))
        original(self, file, offset, parts)

    terminal, before = Terminal(is_terminal=is_terminal), sys.stderr
    SafetensorsSource.read_scattered = slowly  # type: ignore[method-assign]
    sys.stderr = terminal
    try:
        # As little staging makes many small reads.
        sw.materialize(model, directory, cpu_storage="copy", staging_bytes=MIB // 8, progress=progress)
    finally:
        sys.stderr = before
        SafetensorsSource.read_scattered = original  # type: ignore[method-assign]
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


def test_the_first_rank_shows_bytes_rate_time_left_and_the_slowest_rank(pool: RankPool, files: str) -> None:
    first, second = pool.run(fill_slowly, files, True, None, 0.08, ranks=2)
    assert second == ""  # one line for the job
    assert re.search(r"reading \S+ \d+\.\d/16\.[08] MiB \d+\.\d MB/s 0:00:0\d rank 1 at \d+ %", first), first
    shown = [float(part) for part in re.findall(r"(\d+\.\d)/16\.[08] MiB", first)]
    assert shown == sorted(shown)
    assert any(0 < each < 15 for each in shown)
    # It stays until the last rank is done, though the first one was done long before.
    assert shown[-1] == pytest.approx(16, abs=0.1)
    shares = [int(share) for share in re.findall(r"rank 1 at (\d+) %", first)]
    assert any(share > 60 for share in shares), shares


@pytest.mark.parametrize(
    ("is_terminal", "progress"), [(False, None), (True, False)], ids=["no terminal", "not wanted"]
)
def test_otherwise_nothing_is_written(
    pool: RankPool, files: str, is_terminal: bool, progress: bool | None
) -> None:
    assert pool.run(fill_slowly, files, is_terminal, progress, 0.02, ranks=2) == ["", ""]


def test_where_nothing_can_be_erased_the_last_line_is_written_if_it_is_wanted(
    pool: RankPool, files: str
) -> None:
    first, second = pool.run(fill_slowly, files, False, True, 0.02, ranks=2)
    assert first.count("reading") == 1
    assert re.search(r"16\.[08]/16\.[08] MiB", first)
    assert second == ""


def test_one_process_names_no_rank(files: str, pool: RankPool) -> None:
    (alone,) = pool.run(fill_slowly, files, True, None, 0.05, ranks=1)
    assert "MB/s" in alone
    assert "rank" not in alone
