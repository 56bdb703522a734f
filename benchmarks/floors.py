"""The least that a load can cost: the bytes of a rank's shards read by nothing but threads that read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from shardwise.checkpoint import SafetensorsSource
from shardwise.materialization.read import read_threads

_REQUEST_BYTES = 16 * 2**20  # as a load has them at most


def raw_read(directory: str, *, keep: bool) -> int:
    """Read this rank's rows of every stored tensor with as many threads as a load has; return how many bytes that were.

    Args:
        directory: Of the checkpoint.
        keep: Into fresh memory, as shards that are copied; else into one buffer for each thread, which is used again.
    """
    runs = list(_own_runs(directory))
    total = sum(stop - start for _, start, stop in runs)
    files = {path: os.open(path, os.O_RDONLY) for path in {path for path, _, _ in runs}}
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    kept = memoryview(mmap.mmap(-1, max(1, total), flags=anonymous)) if keep else None
    threads = read_threads()
    buffers = [memoryview(mmap.mmap(-1, _REQUEST_BYTES, flags=anonymous)) for _ in range(threads)]

    def read(request: tuple[str, int, int, int]) -> None:
        path, start, stop, at = request
        buffer = buffers.pop()
        into = kept[at : at + stop - start] if kept is not None else buffer[: stop - start]
        while len(into):
            got = os.preadv(files[path], [into], start)
            start, into = start + got, into[got:]
        buffers.append(buffer)

    requests, at = [], 0
    for path, first, last in runs:
        for start in range(first, last, _REQUEST_BYTES):
            stop = min(start + _REQUEST_BYTES, last)
            requests.append((path, start, stop, at))
            at += stop - start
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, requests))
    for descriptor in files.values():
        os.close(descriptor)
    return total


def _own_runs(directory: str) -> Iterator[tuple[str, int, int]]:
    """Yield file, first and last byte (exclusive) of this rank's rows of each tensor, in the order of the files."""
    source = SafetensorsSource.open(Path(directory))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for stored in sorted(source.tensors.values(), key=lambda each: (each.file, each.start)):
        rows = stored.shape[0] if stored.shape else 1
        row_bytes = stored.nbytes // max(1, rows)
        most = -(-rows // ranks)
        first, last = min(rows, rank * most), min(rows, (rank + 1) * most)
        if first < last:
            path = str(Path(directory) / stored.file)
            yield path, stored.start + first * row_bytes, stored.start + last * row_bytes
