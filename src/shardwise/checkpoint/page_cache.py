"""Files into the page cache while something else is done: a disk is slow, and building a model needs none of it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from shardwise.checkpoint.regular_file import open_regular
from shardwise.errors import CheckpointError

_PIECE_BYTES = 32 * 2**20
"""Of one call, in which the interpreter lock is free: getting that lock back may take 5 ms."""
_THREADS = 2
"""One alone leaves the disk idle between its calls; more than that are no faster."""
_MOST_OF_FREE_MEMORY = 0.5
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def fetch_pages(files: Sequence[tuple[Path, int]], *, part: int, parts: int) -> None:
    """Bring one part of files into the page cache, on threads that nobody waits for.

    What is in it already is not touched. Nothing is done where the files would take more than half of the memory that is free: pages
    that are dropped before they are used would be read twice. Linux only.

    Args:
        files: Path and size, in bytes.
        part: Of this process.
        parts: The same for all processes that share the work; pieces go to them in turn, so that all are at about one place.
    """
    if sys.platform != "linux" or sum(size for _, size in files) > _MOST_OF_FREE_MEMORY * _free_bytes():
        return
    pieces = [
        (path, start, min(_PIECE_BYTES, size - start))
        for path, size in files
        for start in range(0, size, _PIECE_BYTES)
    ]
    own = pieces[part::parts]
    for number in range(_THREADS):
        of_thread = own[number::_THREADS]
        threading.Thread(target=_fetch, args=(of_thread,), name="shardwise-fetch", daemon=True).start()


def _fetch(pieces: Sequence[tuple[Path, int, int]]) -> None:
    try:
        with open(os.devnull, "wb", buffering=0) as nowhere:
            for path, start, nbytes in pieces:
                descriptor = open_regular(path, flags=0)
                try:
                    if not _is_cached(descriptor, start, nbytes):
                        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                        _send(nowhere.fileno(), descriptor, start, nbytes)
                finally:
                    os.close(descriptor)
    except (OSError, CheckpointError):
        return  # the load itself finds it, and says so


def _send(nowhere: int, descriptor: int, start: int, nbytes: int) -> None:
    """Read without a copy: pages are handed from the file to a device that drops them."""
    while nbytes > 0:
        sent = os.sendfile(nowhere, descriptor, start, nbytes)
        if sent == 0:
            return
        start, nbytes = start + sent, nbytes - sent


def _is_cached(descriptor: int, start: int, nbytes: int) -> bool:
    """Return whether the first, a middle and the last byte of a piece are in the page cache."""
    try:
        for at in (start, start + nbytes // 2, start + nbytes - 1):
            os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT)
    except OSError:  # it would have to wait; or the file system cannot say
        return False
    return True


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
