"""What one rank's load cannot be faster than: the same bytes read by the same threads, and copied from pinned memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shardwise.materialization.cpus import keep_to
from shardwise.materialization.staging import StagingRing, default_staging_bytes, ring_shape

_REPEATS = 3


@contextmanager
def _ring(device: torch.device) -> Iterator[tuple[StagingRing, list[torch.Tensor]]]:
    """Have the ring that a load on this device has, and its buffers; on the CPU one of the same shape."""
    shape = ring_shape(default_staging_bytes("accelerator"), on_host=False)
    ring = StagingRing(count=shape.count, nbytes=shape.nbytes, device=device)
    buffers = [ring.take() for _ in range(shape.count)]
    for buffer in buffers:
        buffer.zero_()  # pages that were never written would be made in the middle
    try:
        yield ring, buffers
    finally:
        ring.close()


def read_floor(files: list[Path], device: torch.device) -> dict[str, Any]:
    """Read all bytes of the files into pinned memory, chunk by chunk on threads; best of three."""
    descriptors = {path: os.open(path, os.O_RDONLY) for path in files}
    with _ring(device) as (ring, free):
        chunk = ring.nbytes
        jobs = [(path, at) for path in files for at in range(0, path.stat().st_size, chunk)]

        def read(job: tuple[Path, int]) -> int:
            path, at = job
            slot = free.pop()
            try:
                return os.preadv(descriptors[path], [memoryview(slot.numpy())], at)
            finally:
                free.append(slot)

        with ThreadPoolExecutor(ring.threads, initializer=keep_to, initargs=(ring.cpus,)) as pool:
            nbytes, seconds = _best(lambda: sum(pool.map(read, jobs)))
        threads = ring.threads
    for descriptor in descriptors.values():
        os.close(descriptor)
    return {"bytes": nbytes, "seconds": seconds, "threads": threads, "chunk_bytes": chunk}


def copy_floor(nbytes: int, device: torch.device) -> dict[str, Any]:
    """Copy as many bytes from pinned memory to the device, chunk by chunk; best of three."""
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    with _ring(device) as (ring, buffers):
        chunk = ring.nbytes

        def copy() -> int:
            for number, at in enumerate(range(0, nbytes, chunk)):
                part = target[at : at + chunk]
                part.copy_(buffers[number % len(buffers)][: len(part)], non_blocking=True)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            return nbytes

        copied, seconds = _best(copy)
    return {"bytes": copied, "seconds": seconds, "chunk_bytes": chunk}


def _best(work: Callable[[], int]) -> tuple[int, float]:
    found = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        nbytes = work()
        found.append(time.perf_counter() - started)
    return nbytes, min(found)
