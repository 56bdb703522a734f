"""The one progress line of a job: what it says, on whose terminal, and silence elsewhere."""

from __future__ import annotations

import io
import itertools
import os
import re
import sys
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.checkpoint import SafetensorsSource
from shardwise.materialization import read
from shardwise.testing import RankPool
from tests.distributed.steps import SECONDS_TO_COME

pytestmark = pytest.mark.distributed

TENSORS, MIB = 8, 2**20
STAGING_BYTES, READS = MIB // 8, 64  # so little that a rank makes many small reads


class Terminal(io.StringIO):
    """Standard error that is a terminal, or says that it is none; it tells the other rank once it has shown what that one waits for."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def write(self, text: str) -> int:
        if re.search(r"rank 1 at [6-9]\d %", text):
            dist.distributed_c10d._get_default_store().add("shown", 1)
        return super().write(text)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """16 MiB in eight tensors: 1 MiB of each for each of two ranks."""
    directory = tmp_path_factory.mktemp("progress")
    save_file({f"{i}.weight": torch.ones(1024, 512) for i in range(TENSORS)}, directory / "model.safetensors")
    return str(directory)


def fill_slowly(
    directory: str,
    is_terminal: bool,
    progress: bool | None,
    seconds_per_read: float,
    until_shown: bool = False,
) -> str:
    """Return what was written to standard error, without its colours; rank 1 reads at half the speed.

    Where it is asked for, one of its last reads waits until the first rank, which has read everything, has shown its share.
    """
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(512, 1024, bias=False) for _ in range(TENSORS)))
    fully_shard(model)
    original, store, reads = (
        SafetensorsSource.read_scattered,
        dist.distributed_c10d._get_default_store(),
        itertools.count(1),
    )

    def slowly(self: SafetensorsSource, file: str, offset: int, parts: Any) -> None:
        time.sleep(seconds_per_read * (dist.get_rank() + 1))
        if until_shown and dist.get_rank() == 1 and next(reads) == READS - 4:
            deadline = time.monotonic() + SECONDS_TO_COME
            while not store.add("shown", 0) and time.monotonic() < deadline:
                time.sleep(0.01)
        original(self, file, offset, parts)

    terminal, before = Terminal(is_terminal=is_terminal), sys.stderr
    SafetensorsSource.read_scattered = slowly  # type: ignore[method-assign]
    sys.stderr = terminal
    try:
        with (
            mock.patch.dict(os.environ, {"COLUMNS": "120", "TERM": "xterm"}),
            mock.patch.object(read, "read_threads", return_value=4),
        ):
            sw.materialize(
                model, directory, cpu_storage="copy", staging_bytes=STAGING_BYTES, progress=progress
            )
    finally:
        sys.stderr = before
        SafetensorsSource.read_scattered = original  # type: ignore[method-assign]
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


def test_the_first_rank_shows_bytes_rate_time_left_and_the_slowest_rank(pool: RankPool, files: str) -> None:
    first, second = pool.run(fill_slowly, files, True, None, 0.06, True, ranks=2)
    assert second == ""  # one line for the job
    assert re.search(r"reading \S+ \d+\.\d/16\.[08] MiB \d+\.\d MB/s 0:\d\d:\d\d rank 1 at \d+ %", first), (
        first
    )
    shown = [float(part) for part in re.findall(r"(\d+\.\d)/16\.[08] MiB", first)]
    assert shown == sorted(shown)
    assert any(0 < each < shown[-1] for each in shown)
    # It stays until the last rank is done, though the first one was done long before.
    assert shown[-1] == pytest.approx(16, abs=0.1)
    shares = [int(share) for share in re.findall(r"rank 1 at (\d+) %", first)]
    assert any(share >= 60 for share in shares), shares


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
