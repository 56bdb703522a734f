"""Host buffers that every byte passes through which is not read straight into place."""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from shardwise.errors import ConfigurationError
from shardwise.materialization.cpus import (
    cpus_near,
    cpus_of_node,
    device_read_threads,
    positive_from,
    usable_of,
)
from shardwise.materialization.pinned import PinnedMemory

_MEBIBYTE = 2**20
_STAGING_BYTES = {"cpu": 64 * _MEBIBYTE}
_STAGING_BYTES_ON_ACCELERATORS = 256 * _MEBIBYTE
_LARGEST_READ_BYTES = 4 * _MEBIBYTE
RING_BUFFERS = 8
CHUNK_BYTES_VARIABLE: Final = "SHARDWISE_CHUNK_BYTES"
_CHUNKS = 16
_SMALLEST_CHUNK_BYTES, _LARGEST_CHUNK_BYTES = 8 * _MEBIBYTE, 32 * _MEBIBYTE
_FEWEST_CHUNKS = 4
_LONGEST_ELEMENT_BYTES = 16


def default_staging_bytes(device_type: str) -> int:
    """Return the bound of a rank's staging buffers: 64 MiB on CPU ranks, 256 MiB on accelerators."""
    return _STAGING_BYTES.get(device_type, _STAGING_BYTES_ON_ACCELERATORS)


def read_bytes_of(staging_bytes: int) -> int:
    """Return the size of one read into host memory, and of one staging buffer there."""
    return max(_LONGEST_ELEMENT_BYTES, min(_LARGEST_READ_BYTES, staging_bytes // RING_BUFFERS))


@dataclass(frozen=True, slots=True, kw_only=True)
class RingShape:
    """How a load divides its staging.

    Args:
        count: Number of buffers.
        nbytes: Size of each, and of the largest read, in bytes.
    """

    count: int
    nbytes: int


def ring_shape(staging_bytes: int, *, on_host: bool, environ: Mapping[str, str] = os.environ) -> RingShape:
    """Return how a load divides its staging.

    On the way to a device a buffer is a chunk of 8 to 32 MiB: what is done for each of them in Python must be short against the time
    that its bytes travel, and there must be enough of them for all threads to read while others are copied.

    Args:
        staging_bytes: Bound of all of them.
        on_host: Whether the shards are in host memory.
        environ: `SHARDWISE_CHUNK_BYTES` in it wins, for devices.

    Raises:
        ConfigurationError: The variable is not a size that fits.
    """
    if on_host:
        return RingShape(count=RING_BUFFERS, nbytes=read_bytes_of(staging_bytes))
    asked = positive_from(environ, CHUNK_BYTES_VARIABLE)
    if asked is not None and not _LONGEST_ELEMENT_BYTES <= asked <= staging_bytes // 2:
        raise ConfigurationError(
            f"{CHUNK_BYTES_VARIABLE}: expected {_LONGEST_ELEMENT_BYTES} to {staging_bytes // 2:,} bytes, so that two fit into "
            f"staging_bytes={staging_bytes:,}, got {asked:,}."
        )
    small = min(_SMALLEST_CHUNK_BYTES, staging_bytes // _FEWEST_CHUNKS)
    nbytes = asked or min(_LARGEST_CHUNK_BYTES, max(staging_bytes // _CHUNKS, small))
    if nbytes > mmap.PAGESIZE:
        nbytes -= nbytes % mmap.PAGESIZE
    nbytes = max(_LONGEST_ELEMENT_BYTES, nbytes)
    return RingShape(count=max(2, staging_bytes // nbytes), nbytes=nbytes)


class StagingRing:
    """A few host buffers of one size, handed out in turn.

    On an accelerator they are parts of one piece of pinned memory, so that a copy to the device can overlap the next read; a
    buffer is handed out again only when the copies out of it are done. Nothing is allocated before the first use.

    Args:
        count: Number of buffers.
        nbytes: Size of each, in bytes.
        device: That the bytes go to, or come from.
    """

    def __init__(self, *, count: int, nbytes: int, device: torch.device) -> None:
        self.count = count
        self.nbytes = nbytes
        self.is_pinned = device.type != "cpu"
        self.cpus = cpus_near(device) if self.is_pinned else None
        self._device = device
        self._free: deque[torch.Tensor] = deque()
        self._made = 0
        self._pinned: PinnedMemory | None = None
        self._busy: deque[tuple[torch.Tensor, torch.Event]] = deque()

    @property
    def available(self) -> bool:
        """Whether `take` hands out a buffer without waiting for reads that are in progress."""
        return bool(self._free) or bool(self._busy) or self._made < self.count

    @property
    def threads(self) -> int:
        """Number of threads that read into pinned buffers."""
        return device_read_threads(cpus=usable_of(self.cpus), of_node=cpus_of_node(), environ=os.environ)

    def take(self) -> torch.Tensor:
        """Return a free buffer: uint8, `nbytes` long. It must be given back."""
        if not self._free and self._made < self.count:
            self._make()
        if not self._free:
            buffer, copied = self._busy.popleft()
            copied.synchronize()
            return buffer
        return self._free.popleft()

    def give_back(self, buffer: torch.Tensor, *, copied: torch.Event | None = None) -> None:
        """Take a buffer back.

        Args:
            buffer: As `take` returned it.
            copied: Reached when the copies out of it are done; None: they are.
        """
        if copied is None:
            self._free.append(buffer)
        else:
            self._busy.append((buffer, copied))

    def drain(self) -> None:
        """Wait until all copies out of buffers that were given back are done."""
        while self._busy:
            buffer, copied = self._busy.popleft()
            copied.synchronize()
            self._free.append(buffer)

    def close(self) -> None:
        """Let go of the memory. Copies out of buffers that were not given back must be done."""
        self.drain()
        self._free.clear()
        self._made = self.count
        pinned, self._pinned = self._pinned, None
        if pinned is not None:
            pinned.close()

    def _make(self) -> None:
        if not self.is_pinned:
            self._made += 1
            # The host is named, because torch's default device may be another.
            self._free.append(torch.empty(self.nbytes, dtype=torch.uint8, device="cpu"))
            return
        # At once: pinning waits for the device, and would do so in the middle of the load.
        self._pinned = PinnedMemory(
            self.count * self.nbytes, device=self._device, threads=self.threads, cpus=self.cpus
        )
        self._made = self.count
        self._free.extend(torch.split(self._pinned.bytes, self.nbytes))
