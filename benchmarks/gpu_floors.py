"""What one rank's load cannot be faster than: the same bytes read by the same threads, and copied from pinned memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from shardwise.materialization.cpus import cpus_near, device_read_threads, keep_to, usable_of
from shardwise.materialization.pinned import PinnedMemory
from shardwise.materialization.staging import default_staging_bytes, ring_shape

_REPEATS = 3


def _ring(device: torch.device) -> tuple[Any, int, int, Any]:
    """Return memory, chunk and threads as a load on this device has them."""
    on_host = device.type == "cpu"
    shape = ring_shape(default_staging_bytes("cuda"), on_host=False)
    near = None if on_host else cpus_near(device)
    threads = device_read_threads(cpus=usable_of(near), environ=os.environ)
    nbytes = shape.count * shape.nbytes
    if on_host:
        return torch.zeros(nbytes, dtype=torch.uint8), shape.nbytes, threads, None
    pinned = PinnedMemory(nbytes, device=device, threads=threads, cpus=near)
    return pinned.bytes, shape.nbytes, threads, (pinned, near)


def read_floor(files: list[Path], device: torch.device) -> dict[str, Any]:
    """Read all bytes of the files into pinned memory, chunk by chunk on threads; best of three."""
    memory, chunk, threads, held = _ring(device)
    slots = list(torch.split(memory, chunk))
    jobs = [(path, at) for path in files for at in range(0, path.stat().st_size, chunk)]
    descriptors = {path: os.open(path, os.O_RDONLY) for path in files}
    free = list(slots)

    def read(job: tuple[Path, int]) -> int:
        path, at = job
        slot = free.pop()
        try:
            return os.preadv(descriptors[path], [memoryview(slot.numpy())], at)
        finally:
            free.append(slot)

    with ThreadPoolExecutor(threads, initializer=keep_to, initargs=(held[1] if held else None,)) as pool:
        nbytes, seconds = _best(lambda: sum(pool.map(read, jobs)))
    for descriptor in descriptors.values():
        os.close(descriptor)
    if held:
        held[0].close()
    return {"bytes": nbytes, "seconds": seconds, "threads": threads, "chunk_bytes": chunk}


def copy_floor(nbytes: int, device: torch.device) -> dict[str, Any]:
    """Copy as many bytes from pinned memory to the device, chunk by chunk; best of three."""
    memory, chunk, _, held = _ring(device)
    slots = list(torch.split(memory, chunk))
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def copy() -> int:
        for number, at in enumerate(range(0, nbytes, chunk)):
            part = target[at : at + chunk]
            part.copy_(slots[number % len(slots)][: len(part)], non_blocking=True)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return nbytes

    copied, seconds = _best(copy)
    if held:
        held[0].close()
    return {"bytes": copied, "seconds": seconds, "chunk_bytes": chunk}


def _best(work: Callable[[], int]) -> tuple[int, float]:
    found = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        nbytes = work()
        found.append(time.perf_counter() - started)
    return nbytes, min(found)
