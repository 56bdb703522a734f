"""Mapped pages into the page cache before they are touched: page faults alone read a fraction of what a disk can."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from shardwise.checkpoint.regular_file import open_regular
from shardwise.errors import CheckpointError

_PIECE_BYTES = 32 * 2**20
"""Of one call, in which the interpreter lock is free: getting that lock back may take 5 ms."""
_MOST_BETWEEN_BYTES = 2**20
"""That are fetched along: of many small tensors each would be a call."""
_THREADS = 2
"""One alone leaves the disk idle between its calls; more than that are no faster."""
_MOST_OF_FREE_MEMORY = 0.5
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def are_cached(descriptor: int, places: Iterable[int]) -> bool:
    """Return whether bytes of a file are in the page cache, up to the first that is not; False where the system does not tell.

    Linux begins to fetch the page that it is asked for and has not: the same bytes would be found there by the next who asks.

    Args:
        descriptor: Of the file.
        places: Of the bytes.

    Source: preadv2(2), RWF_NOWAIT. mincore(2) says of files of other users that all of them is there.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        for at in places:
            os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT)
    except OSError:  # EAGAIN: it would have to wait for the disk
        return False
    return True


def fetch_pages(ranges: Sequence[tuple[Path, int, int]], *, sharers: int) -> None:
    """Bring ranges of files into the page cache, on threads that nobody waits for.

    What is in it already is not read. Nothing is done where the ranges would take more than half of the memory that is free: pages
    that are dropped before they are used would be read twice. Linux only.

    Args:
        ranges: Path, first and last byte (exclusive) of each.
        sharers: Processes on this node that fetch about as much.
    """
    if sys.platform != "linux":
        return
    pieces = _pieces(ranges)
    nbytes = sum(stop - start for _, start, stop in pieces)
    if not pieces or nbytes * sharers > _MOST_OF_FREE_MEMORY * _free_bytes():
        return
    for number in range(_THREADS):
        of_thread = pieces[number::_THREADS]
        threading.Thread(target=_fetch, args=(of_thread,), name="shardwise-fetch", daemon=True).start()


def _pieces(ranges: Sequence[tuple[Path, int, int]]) -> list[tuple[Path, int, int]]:
    """Join ranges with little between them, and cut them into pieces, in the order of the files."""
    joined: list[tuple[Path, int, int]] = []
    # By text: comparing paths themselves takes longer than the rest, where ranges are many.
    for path, start, stop in sorted(ranges, key=lambda each: (str(each[0]), *each[1:])):
        if joined and joined[-1][0] == path and start - joined[-1][2] <= _MOST_BETWEEN_BYTES:
            joined[-1] = path, joined[-1][1], max(stop, joined[-1][2])
        else:
            joined.append((path, start, stop))
    return [
        (path, at, min(at + _PIECE_BYTES, stop))
        for path, start, stop in joined
        for at in range(start, stop, _PIECE_BYTES)
    ]


def _fetch(pieces: Sequence[tuple[Path, int, int]]) -> None:
    try:
        with open(os.devnull, "wb", buffering=0) as nowhere:
            for path, of_file in itertools.groupby(pieces, key=lambda piece: piece[0]):
                descriptor = open_regular(path, flags=0)
                try:
                    for _, start, stop in of_file:
                        if not are_cached(descriptor, (start, (start + stop) // 2, stop - 1)):
                            _send(nowhere.fileno(), descriptor, start, stop)
                finally:
                    os.close(descriptor)
    except (OSError, CheckpointError):
        return  # whoever touches the pages finds it


def _send(nowhere: int, descriptor: int, start: int, stop: int) -> None:
    """Read without a copy: pages are handed from the file to a device that drops them."""
    while start < stop:
        sent = os.sendfile(nowhere, descriptor, start, stop - start)
        if sent == 0:
            return
        start += sent


def _free_bytes() -> int:
    """Return how much memory this machine has free, page cache included, or the container's limit if that is less."""
    free = 0
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
    for limit in _LIMITS:
        try:
            free = min(free, int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # none, or "max"
            continue
    return free
