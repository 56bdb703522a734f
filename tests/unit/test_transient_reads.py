"""Errors of the system while a file is read: what is over in a moment is tried again and counted, all else is named."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shardwise as sw
from shardwise.checkpoint import ranged_file
from shardwise.checkpoint.ranged_file import BounceBuffers, RangedFile
from shardwise.checkpoint.regular_file import unreadable
from shardwise.errors import ChangedFileError, CheckpointError, OutOfMemoryError
from shardwise.materialization.out_of_memory import naming_out_of_memory

NBYTES = 50_000
OFFSET = 4_000  # within a page


@pytest.fixture(autouse=True)
def _cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is in the page cache, although it has just been written: direct reads are made."""
    monkeypatch.setattr(RangedFile, "_is_cached", lambda *_: False)


class System:
    """`os.preadv` with errors and short reads, and `time.sleep` that only notes.

    Args:
        errors: Raised by the next calls, one each.
        most: Bytes that one call gives.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.errors: list[int] = []
        self.most = 10**9
        self.calls = 0
        self.pauses: list[float] = []
        self._preadv = os.preadv
        monkeypatch.setattr(os, "preadv", self.preadv)
        monkeypatch.setattr(ranged_file.time, "sleep", self.pauses.append)

    def preadv(self, fd: int, buffers: Any, offset: int) -> int:
        self.calls += 1
        if self.errors:
            code = self.errors.pop(0)
            raise OSError(code, os.strerror(code))
        # Aligned buffers stay whole, as a direct read wants them; what lies beyond a short read is rubbish.
        got = self._preadv(fd, buffers, offset)
        left = self.most
        for buffer in buffers:
            beyond = memoryview(buffer)[left:]
            beyond[:] = b"\xaa" * len(beyond)
            left = max(0, left - len(buffer))
        return min(got, self.most)


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    return System(monkeypatch)


@pytest.fixture(params=[False, True], ids=["page cache", "direct_io"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[RangedFile, bytes]]:
    """An open file, and its content."""
    content = os.urandom(OFFSET + NBYTES)
    (tmp_path / "x.bin").write_bytes(content)
    opened = RangedFile(tmp_path / "x.bin", bounce=BounceBuffers(nbytes=16_384) if request.param else None)
    if request.param and opened._direct_fd is None:
        opened.close()
        pytest.skip("no way around the page cache here")
    yield opened, content
    opened.close()


def read(opened: RangedFile) -> bytes:
    got = bytearray(NBYTES)
    opened.read_into(OFFSET, memoryview(got))
    return bytes(got)


@pytest.mark.parametrize("code", [errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.EBUSY])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_an_error_that_is_over_in_a_moment(
    file: tuple[RangedFile, bytes], system: System, code: int, times: int
) -> None:
    opened, content = file
    system.errors = [code] * times
    assert read(opened) == content[OFFSET:]
    assert opened.retries == times
    assert system.pauses == [0.05, 0.2, 0.8][:times]  # longer each time


def test_each_part_of_a_read_has_its_own_tries(file: tuple[RangedFile, bytes], system: System) -> None:
    opened, content = file
    for _ in range(3):
        system.errors = [errno.EIO] * 3
        assert read(opened) == content[OFFSET:]
    assert opened.retries == 9


@pytest.mark.parametrize(
    ("codes", "name"),
    [([errno.EIO] * 4, "EIO"), ([errno.EACCES], "EACCES"), ([errno.EIO, errno.ESTALE], "ESTALE")],
    ids=["stays", "is no passing one", "becomes another"],
)
def test_an_error_that_stays(
    file: tuple[RangedFile, bytes], system: System, codes: list[int], name: str
) -> None:
    opened, _ = file
    system.errors = list(codes)
    with pytest.raises(CheckpointError, match=rf"x\.bin: reading at byte {OFFSET} failed: {name} \("):
        read(opened)
    assert system.errors == []
    assert opened.retries == len(codes) - 1


@pytest.mark.parametrize("most", [1_000, 4_096, 5_000])
def test_short_reads_go_on_where_they_ended(
    file: tuple[RangedFile, bytes], system: System, most: int
) -> None:
    opened, content = file
    system.most = most
    assert read(opened) == content[OFFSET:]
    assert system.calls >= NBYTES // most
    assert opened.retries == 0


def test_short_reads_fill_parts_in_order(file: tuple[RangedFile, bytes], system: System) -> None:
    opened, content = file
    system.most = 700
    parts = [bytearray(length) for length in (1, 699, 700, 0, 2_001, 5)]
    opened.read_scattered(OFFSET, [memoryview(part) for part in parts])
    assert b"".join(parts) == content[OFFSET : OFFSET + sum(map(len, parts))]


def test_the_end_of_the_file_is_no_short_read(file: tuple[RangedFile, bytes]) -> None:
    opened, _ = file
    with pytest.raises(ChangedFileError, match=r"expected 200000 bytes at byte 4000, got 50000"):
        opened.read_into(OFFSET, memoryview(bytearray(200_000)))


def test_signals_do_not_break_a_read(file: tuple[RangedFile, bytes]) -> None:
    opened, content = file
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        ends = time.monotonic() + 0.2
        while time.monotonic() < ends:
            assert read(opened) == content[OFFSET:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen
    assert opened.retries == 0


@pytest.mark.parametrize("direct_io", [False, True])
def test_retries_are_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_io: bool) -> None:
    save_file({"weight": torch.arange(64.0).view(8, 8)}, tmp_path / "model.safetensors")
    system = System(monkeypatch)
    opened: list[Path] = []
    real = RangedFile.read_scattered

    def hurt(self: RangedFile, offset: int, parts: Any) -> None:
        if offset > 8 and sum(map(len, parts)) == 256:  # the tensor's bytes
            opened.append(self.path)
            system.errors = [errno.EIO, errno.EIO]
        real(self, offset, parts)

    monkeypatch.setattr(RangedFile, "read_scattered", hurt)
    model = nn.Linear(8, 8, bias=False, device="meta")
    report = sw.materialize(model, tmp_path, cpu_storage="copy", direct_io=direct_io)
    assert opened
    assert model.weight.flatten().tolist() == list(range(64))
    assert [each.retried_reads for each in report.ranks] == [2]
    assert report.to_json()["ranks"][0]["retried_reads"] == 2


# --- what is named for what it is ---


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (
            errno.ENOMEM,
            r"ENOMEM \(.*\)\. The machine has no memory left for it: run fewer ranks on this node",
        ),
        (errno.ENOSPC, r"ENOSPC \(.*\)\. The file system is full: make room on it\."),
        (
            errno.EMFILE,
            r"EMFILE \(.*\)\. This process has too many open files: raise the limit \(ulimit -n\)\.",
        ),
        (errno.EIO, r"EIO \(.*\)\. Check its permissions, the disk and the mount\."),
    ],
)
def test_an_error_of_the_system_has_its_remedy(code: int, text: str) -> None:
    error = unreadable(Path("/data/x.bin"), OSError(code, os.strerror(code)), what="opening it")
    with pytest.raises(CheckpointError, match=rf"^/data/x\.bin: opening it failed: {text}"):
        raise error


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ENOSPC])
def test_a_read_without_memory_or_room_is_not_tried_again(
    file: tuple[RangedFile, bytes], system: System, code: int
) -> None:
    opened, _ = file
    system.errors = [code]
    with pytest.raises(CheckpointError, match=errno.errorcode[code]):
        read(opened)
    assert (opened.retries, system.pauses) == (0, [])


HOSTS_ALLOCATOR = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            MemoryError("no"),
            r"expected host memory for them on rank 3 \(.*\), got no\. Use more ranks or nodes",
        ),
        (RuntimeError(HOSTS_ALLOCATOR), r"expected host memory for them on rank 3 .*you tried to allocate 8"),
        (
            torch.OutOfMemoryError("full"),
            r"expected memory on cuda:1 for them on rank 3 .*got full\. Use more ranks",
        ),
    ],
    ids=["Python", "torch's host allocator", "a device"],
)
def test_memory_that_is_not_there_is_named(error: Exception, text: str) -> None:
    with (
        pytest.raises(OutOfMemoryError, match=rf"^the shards: {text}") as caught,
        naming_out_of_memory("the shards", device=torch.device("cuda", 1), rank=3),
    ):
        raise error
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("error", [RuntimeError("another fault"), OutOfMemoryError("named already")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with (
        pytest.raises(type(error)) as caught,
        naming_out_of_memory("the shards", device=torch.device("cpu"), rank=0),
    ):
        raise error
    assert caught.value is error
