"""Slow reads and stopped ranks are waited for while anything moves; a read that hangs is named by its rank and file."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import shardwise as sw
from shardwise.checkpoint.ranged_file import RangedFile
from shardwise.errors import StalledReadError
from shardwise.materialization import awaited_call, read
from shardwise.testing import RankPool
from tests.distributed.steps import connected_ranks, every_rank

pytestmark = pytest.mark.distributed

TENSORS = 12
SECONDS_PER_READ = 0.5
TIMEOUT_SECONDS = 4.0  # several reads, and two thirds of all of a rank
STALL_TIMEOUT_SECONDS = 6.0
OPEN_TIMEOUT_SECONDS, OPEN_PART = (
    8.0,
    0.25,
)  # so small a part that a busy machine cannot make the other rank give up first
HANGING_SECONDS = 60.0
PROMPT_SECONDS = 30.0
SLOW = 1  # the rank that has the trouble


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """bf16 tensors, which go through staging one by one where a model is float32."""
    directory = tmp_path_factory.mktemp("slow")
    torch.manual_seed(0)
    values = {f"{i}.weight": torch.randn(64, 64).bfloat16() for i in range(TENSORS)}
    save_file(values, directory / "model.safetensors")
    return str(directory)


def sharded() -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(TENSORS)))
    fully_shard(model)
    return model


def reads_values(offset: int) -> bool:
    """Return whether a read is of tensors, and not of the header, which a thread that reads tensors looks at once more."""
    return threading.current_thread().name.startswith("shardwise-read") and offset > 8


@contextmanager
def reads_of_one_rank(before: Callable[[], Any]) -> Iterator[None]:
    """Call something before each read of a tensor on the rank that has the trouble; one read at a time on every rank."""
    original = RangedFile.read_scattered

    def hindered(self: RangedFile, offset: int, parts: Sequence[memoryview]) -> None:
        if reads_values(offset):
            before()
        original(self, offset, parts)

    has_it = dist.get_rank() == SLOW
    with (
        mock.patch.object(RangedFile, "read_scattered", hindered if has_it else original),
        mock.patch.object(read, "read_threads", return_value=1),
    ):
        yield


@contextmanager
def slow_reads(*, on: int) -> Iterator[None]:
    """Let a rank's reads take half a second each, in addition to what is done to others."""
    original = RangedFile.read_scattered

    def slow(self: RangedFile, offset: int, parts: Sequence[memoryview]) -> None:
        if reads_values(offset):
            time.sleep(SECONDS_PER_READ)
        original(self, offset, parts)

    with mock.patch.object(RangedFile, "read_scattered", slow if dist.get_rank() == on else original):
        yield


def fill(directory: str, route: str, *, timeout: float) -> None:
    model = sharded()
    sw.materialize(
        model, directory, route=route, dtype=torch.float32, staging_bytes=64 * 1024, timeout=timeout
    )
    for name, value in load_file(Path(directory) / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name).full_tensor(), value.float()), name


def fill_slowly(directory: str, route: str, seconds_per_read: float) -> float:
    started = time.monotonic()
    with reads_of_one_rank(lambda: time.sleep(seconds_per_read)):
        fill(directory, route, timeout=TIMEOUT_SECONDS)
    return time.monotonic() - started


@pytest.mark.parametrize(
    ("route", "seconds_per_read"), [("direct", SECONDS_PER_READ), ("striped", 1.4)], ids=["direct", "striped"]
)
def test_reads_that_last_longer_than_the_timeout_together_but_not_each(
    pool: RankPool, files: str, route: str, seconds_per_read: float
) -> None:
    seconds = pool.run(fill_slowly, files, route, seconds_per_read, ranks=2)
    assert min(seconds) > 1.2 * TIMEOUT_SECONDS  # the other rank has waited for that long


def wait_in_an_exchange(directory: str) -> float:
    """Fill columns, which are exchanged, after rows, which one rank reads slowly while the other waits for it in a collective."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(TENSORS)))
    columns = {model[0].weight, model[1].weight}
    fully_shard(model, shard_placement_fn=lambda parameter: Shard(int(parameter in columns)))
    started = time.monotonic()
    with reads_of_one_rank(lambda: time.sleep(SECONDS_PER_READ)):
        report = sw.materialize(
            model, directory, dtype=torch.float32, staging_bytes=64 * 1024, timeout=TIMEOUT_SECONDS
        )
    assert report.network_bytes > 0
    for name, value in load_file(Path(directory) / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name).full_tensor(), value.float()), name
    return time.monotonic() - started


def test_a_rank_waits_in_a_collective_for_one_that_reads_on(pool: RankPool, files: str) -> None:
    """The group's own timeout would end it."""
    assert min(pool.run(wait_in_an_exchange, files, ranks=2)) > 1.2 * TIMEOUT_SECONDS


def stall(directory: str, route: str) -> tuple[str, str, float, list[str], bool]:
    """Return error, its text, seconds until it, warnings, and whether a second load went well while the read still hangs."""
    release, warnings = threading.Event(), Warnings()
    started = time.monotonic()
    logging.getLogger("shardwise").addHandler(warnings)
    try:
        with (
            reads_of_one_rank(lambda: release.wait(HANGING_SECONDS)),
            slow_reads(on=0),  # while it goes on, the others have patience, but not with the read that hangs
            pytest.raises(sw.ShardwiseError) as caught,
        ):
            fill(directory, route, timeout=STALL_TIMEOUT_SECONDS)
        seconds = time.monotonic() - started
        every_rank(None)
        stuck = [thread for thread in threading.enumerate() if thread.name.startswith("shardwise-read")]
        # Nothing else is left, and nothing on the other ranks.
        assert len(stuck) == (dist.get_rank() == SLOW), [thread.name for thread in stuck]
        assert all(thread.daemon for thread in stuck)
        fill(directory, route, timeout=60)
        return type(caught.value).__name__, str(caught.value), seconds, warnings.texts, True
    finally:
        release.set()
        logging.getLogger("shardwise").removeHandler(warnings)


class Warnings(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.mark.parametrize("route", ["direct", "striped"])
def test_a_read_that_hangs_is_named_on_all_ranks_and_a_retry_works(
    pool: RankPool, files: str, route: str
) -> None:
    seen = pool.run(stall, files, route, ranks=3)
    for rank, (kind, text, seconds, warnings, _) in enumerate(seen):
        assert kind == (StalledReadError.__name__ if rank == SLOW else "PeerError"), text
        assert "model.safetensors: reading" in text
        assert f"has not returned for {0.75 * STALL_TIMEOUT_SECONDS:g} s on rank {SLOW} (" in text
        assert seconds < PROMPT_SECONDS < HANGING_SECONDS
        assert any("model.safetensors: reading" in warning for warning in warnings) == (rank == SLOW)


# Where a file system may stop answering before any value is read: what is replaced, and on which rank.
BEFORE_READS = {
    "looking for it": ("shardwise.materialization.open_source.locate", SLOW),
    "model.safetensors: reading its header": ("shardwise.checkpoint.ranged_file.open_regular", 0),
    "model.safetensors: opening it to map it": ("shardwise.checkpoint.ranged_file.open_regular", SLOW),
    "looking whether its files have changed": ("shardwise.checkpoint.ranged_file._stat", SLOW),
}


def stall_before_reads(directory: str) -> dict[str, tuple[str, str, float]]:
    """Return, for each place, the error, its text and the seconds until it; a second load goes well while the first call hangs."""
    release, seen = threading.Event(), {}

    def hang(*_: Any, **__: Any) -> None:
        release.wait(HANGING_SECONDS)

    try:
        for place, (target, rank) in BEFORE_READS.items():
            has_it = dist.get_rank() == rank
            hangs = mock.patch(target, side_effect=hang) if has_it else nullcontext()
            started = time.monotonic()
            with (
                hangs,
                mock.patch.object(awaited_call, "_PART_OF_TIMEOUT", OPEN_PART),
                pytest.raises(sw.ShardwiseError) as caught,
            ):
                sw.materialize(sharded(), directory, dtype="auto", timeout=OPEN_TIMEOUT_SECONDS)
            seen[place] = type(caught.value).__name__, str(caught.value), time.monotonic() - started
            every_rank(None)
            fill(directory, "direct", timeout=60)
        return seen
    finally:
        release.set()


def test_a_file_system_that_hangs_before_any_read_is_named_too(pool: RankPool, files: str) -> None:
    for rank, seen in enumerate(pool.run(stall_before_reads, files, ranks=2)):
        for place, (kind, text, seconds) in seen.items():
            at = BEFORE_READS[place][1]
            assert kind == (StalledReadError.__name__ if rank == at else "PeerError"), text
            assert f"{place} has not returned for 2 s on rank {at} (" in text
            assert seconds < PROMPT_SECONDS < HANGING_SECONDS


STOPPED_SECONDS = 5.0
SHORT_TIMEOUT_SECONDS = 4.5


def stop_once(directory: str) -> float:
    """Return how long the load took. One rank is stopped for longer than the timeout, while another one reads slowly."""
    stopped: list[bool] = []

    def stop() -> None:
        if not stopped:
            stopped.append(True)
            command = f"sleep {STOPPED_SECONDS}; kill -CONT {os.getpid()}"
            subprocess.Popen(["/bin/sh", "-c", command])
            time.sleep(SECONDS_PER_READ)  # this rank waits for its read before it is stopped
            os.kill(os.getpid(), signal.SIGSTOP)
            for _ in range(
                10
            ):  # and looks at it again before it has returned; the time of one sleep passes while it is stopped
                time.sleep(SECONDS_PER_READ / 10)

    started = time.monotonic()
    with connected_ranks(), reads_of_one_rank(stop), slow_reads(on=0):
        fill(directory, "direct", timeout=SHORT_TIMEOUT_SECONDS)
    return time.monotonic() - started


def test_a_rank_that_is_stopped_is_waited_for_while_another_one_moves(pool: RankPool, files: str) -> None:
    """Neither do the others give it up, nor does it take its own pause for a read that hangs."""
    assert min(pool.run(stop_once, files, ranks=3)) > STOPPED_SECONDS - 0.5


def stop_all(directory: str, stopped: str) -> float:
    """Return how long the load took, of which all ranks were stopped for longer than the timeout; one of them was reading."""
    started, reads = time.monotonic(), 0

    def read_until_stopped() -> None:
        nonlocal reads
        reads += 1
        time.sleep(0.3)
        deadline = time.monotonic() + SHORT_TIMEOUT_SECONDS / 2
        while reads == TENSORS and not os.path.exists(stopped) and time.monotonic() < deadline:
            time.sleep(0.01)

    with connected_ranks(), reads_of_one_rank(read_until_stopped):
        if dist.get_rank() == SLOW:
            pids = " ".join(every_pid())
            command = (
                f"sleep 1; kill -STOP {pids}; sleep {STOPPED_SECONDS}; : > '{stopped}'; kill -CONT {pids}"
            )
            subprocess.Popen(["/bin/sh", "-c", command])
        else:
            every_pid()
        fill(directory, "direct", timeout=SHORT_TIMEOUT_SECONDS)
    return time.monotonic() - started


def every_pid() -> list[str]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, str(os.getpid()))
    return found


def test_a_job_that_is_stopped_as_a_whole_goes_on(pool: RankPool, files: str, tmp_path: Path) -> None:
    assert min(pool.run(stop_all, files, str(tmp_path / "stopped"), ranks=3)) > STOPPED_SECONDS
