"""Ranges of files come into the page cache, and nothing else, and only where there is room for them."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from pathlib import Path

import pytest

from shardwise.checkpoint import page_cache
from shardwise.checkpoint.page_cache import fetch_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such calls")

MIB = 2**20
PIECE_BYTES, PIECES = 48 * MIB, 3  # half of one is more than the kernel reads beyond what it is asked for
MIDDLES = tuple(number * PIECE_BYTES + PIECE_BYTES // 2 for number in range(PIECES))


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of three pieces, all of it a hole, of which no page is in memory."""
    monkeypatch.setattr(page_cache, "_PIECE_BYTES", PIECE_BYTES)
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(PIECE_BYTES * PIECES)
    if any(cached(path)):
        pytest.skip("this file system keeps its pages")
    return path


def cached(path: Path) -> list[bool]:
    """Whether the middle of each piece is in memory; asking by a read would begin to read."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as pages:
        found = (ctypes.c_ubyte * (len(pages) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(pages)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(pages)), found
        )
        del start
    assert not failed
    return [bool(found[at // mmap.PAGESIZE] & 1) for at in MIDDLES]


def fetch(path: Path, *pieces: int, sharers: int = 1) -> None:
    ranges = [(path, piece * PIECE_BYTES, (piece + 1) * PIECE_BYTES) for piece in pieces]
    fetch_pages(ranges, sharers=sharers)
    for thread in threading.enumerate():
        if thread.name == "shardwise-fetch":
            thread.join(timeout=60)
            assert not thread.is_alive()


def test_what_is_asked_for_is_fetched(cold: Path) -> None:
    fetch(cold, 1)
    assert cached(cold) == [False, True, False]
    fetch(cold, 0, 2)
    assert cached(cold) == [True] * PIECES


def test_what_does_not_fit_into_half_of_free_memory_for_all_is_left(
    cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_cache, "_free_bytes", lambda: 8 * PIECE_BYTES - 1)
    fetch(cold, 0, 2, sharers=2)
    assert not any(cached(cold))
    monkeypatch.setattr(page_cache, "_free_bytes", lambda: 8 * PIECE_BYTES)
    fetch(cold, 0, 2, sharers=2)
    assert cached(cold) == [True, False, True]


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
    of_machine = page_cache._free_bytes()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(page_cache, "_LIMITS", (str(limit), str(tmp_path / "other")))
    limit.write_text("max\n")
    assert page_cache._free_bytes() == pytest.approx(of_machine, rel=0.5)
    limit.write_text("4096\n")
    assert page_cache._free_bytes() == 4096


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_file_that_is_gone_is_left_to_the_load(tmp_path: Path) -> None:
    fetch(tmp_path / "gone.safetensors", 0)


def test_pages_that_are_there_are_not_read_again(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr(os, "sendfile", lambda *_: sent.append(1) or 0)
    cold.read_bytes()
    fetch(cold, 0, 1, 2)
    assert not sent
