"""Ranges of files come into the page cache, and nothing else, and only where there is room for them."""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from shardwise.checkpoint import page_cache
from shardwise.checkpoint.page_cache import fetch_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such calls")

MIB = 2**20
PIECE_BYTES, PIECES = 4 * MIB, 3
tells_what_is_cached = pytest.mark.skipif(
    not hasattr(os, "RWF_NOWAIT"), reason="the system does not tell what is cached"
)


class PlayedCache:
    """A page cache that is played, as what a real one keeps is not ours to decide; the calls that fill it are the system's.

    Attributes:
        pages: In it, by number.
        sent: Bytes of the file that were handed to a device that drops them: first and last one (exclusive) of each call.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pages: set[int] = set()
        self.sent: list[tuple[int, int]] = []
        self._preadv, self._sendfile = os.preadv, os.sendfile
        monkeypatch.setattr(os, "preadv", self.preadv)
        monkeypatch.setattr(os, "sendfile", self.sendfile)

    def preadv(self, descriptor: int, buffers: Any, at: int, flags: int = 0) -> int:
        if flags and at // mmap.PAGESIZE not in self.pages:
            raise BlockingIOError(errno.EAGAIN, "not cached")
        return self._preadv(descriptor, buffers, at)

    def sendfile(self, target: int, source: int, start: int, count: int) -> int:
        sent = self._sendfile(
            target, source, start, min(count, MIB)
        )  # the system too sends less than it is asked to
        self.pages.update(range(start // mmap.PAGESIZE, (start + sent) // mmap.PAGESIZE))
        self.sent.append((start, start + sent))
        return sent

    def has(self) -> list[bool]:
        """Whether all of each piece is in it."""
        pages = PIECE_BYTES // mmap.PAGESIZE
        return [self.pages.issuperset(range(n * pages, (n + 1) * pages)) for n in range(PIECES)]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of three pieces, all of it a hole, on a machine with room for it."""
    monkeypatch.setattr(page_cache, "_PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(page_cache, "_free_bytes", lambda: 100 * PIECE_BYTES)
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(PIECE_BYTES * PIECES)
    return path


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> PlayedCache:
    return PlayedCache(monkeypatch)


def fetch(path: Path, *pieces: int, sharers: int = 1) -> None:
    ranges = [(path, piece * PIECE_BYTES, (piece + 1) * PIECE_BYTES) for piece in pieces]
    fetch_pages(ranges, sharers=sharers)
    for thread in threading.enumerate():
        if thread.name == "shardwise-fetch":
            thread.join(timeout=60)
            assert not thread.is_alive()


def test_what_is_asked_for_is_fetched(path: Path, cache: PlayedCache) -> None:
    fetch(path, 1)
    assert cache.has() == [False, True, False]
    assert sum(stop - start for start, stop in cache.sent) == PIECE_BYTES  # and nothing else
    fetch(path, 0, 2)
    assert cache.has() == [True] * PIECES
    assert sum(stop - start for start, stop in cache.sent) == PIECES * PIECE_BYTES


def test_what_does_not_fit_into_half_of_free_memory_for_all_is_left(
    path: Path, cache: PlayedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_cache, "_free_bytes", lambda: 8 * PIECE_BYTES - 1)
    fetch(path, 0, 2, sharers=2)
    assert not cache.sent
    monkeypatch.setattr(page_cache, "_free_bytes", lambda: 8 * PIECE_BYTES)
    fetch(path, 0, 2, sharers=2)
    assert cache.has() == [True, False, True]


def test_small_ranges_are_joined_and_large_ones_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_PIECE_BYTES", 4 * MIB)
    a, b = Path("a"), Path("b")
    ranges = [(b, 0, 5), (a, 100, 200), (a, 0, 100), (a, 300, 9 * MIB), (a, 11 * MIB, 12 * MIB)]
    assert page_cache._pieces(ranges) == [
        (a, 0, 4 * MIB),
        (a, 4 * MIB, 8 * MIB),
        (a, 8 * MIB, 9 * MIB),
        (a, 11 * MIB, 12 * MIB),
        (b, 0, 5),
    ]


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(page_cache, "_LIMITS", ())  # that of the container in which the tests run
    of_machine = page_cache._free_bytes()
    monkeypatch.setattr(page_cache, "_LIMITS", (str(limit), str(tmp_path / "other")))
    limit.write_text("max\n")
    assert page_cache._free_bytes() == pytest.approx(of_machine, rel=0.5)
    limit.write_text("4096\n")
    assert page_cache._free_bytes() == 4096


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_file_that_is_gone_is_left_to_the_load(tmp_path: Path) -> None:
    fetch(tmp_path / "gone.safetensors", 0)


@tells_what_is_cached
def test_pages_that_are_there_are_not_read_again(path: Path, cache: PlayedCache) -> None:
    every_page = set(range(PIECES * PIECE_BYTES // mmap.PAGESIZE))
    cache.pages = set(every_page)
    fetch(path, 0, 1, 2)
    assert not cache.sent
    cache.pages = every_page - {PIECE_BYTES // mmap.PAGESIZE}  # the first one of the second piece
    fetch(path, 0, 1, 2)
    assert cache.has() == [True] * PIECES
    assert sum(stop - start for start, stop in cache.sent) == PIECE_BYTES
