"""Host buffers that every byte passes through which is not read straight into place."""

from __future__ import annotations

from collections import deque

import torch

from shardwise.materialization.device import copies_to, current

_MEBIBYTE = 2**20
_STAGING_BYTES = {"cpu": 64 * _MEBIBYTE}
_STAGING_BYTES_ON_ACCELERATORS = 256 * _MEBIBYTE
_LARGEST_READ_BYTES = 4 * _MEBIBYTE
RING_BUFFERS = 8


def default_staging_bytes(device_type: str) -> int:
    """Return the bound of a rank's staging buffers: 64 MiB on CPU ranks, 256 MiB on accelerators."""
    return _STAGING_BYTES.get(device_type, _STAGING_BYTES_ON_ACCELERATORS)


def read_bytes_of(staging_bytes: int) -> int:
    """Return the size of one read, and of one staging buffer."""
    return max(16, min(_LARGEST_READ_BYTES, staging_bytes // RING_BUFFERS))


def staging_ring(staging_bytes: int, device: torch.device) -> StagingRing:
    """Return the staging buffers of a call, within its bound."""
    return StagingRing(count=RING_BUFFERS, nbytes=read_bytes_of(staging_bytes), device=device)


class StagingRing:
    """A few host buffers of one size, handed out in turn.

    On an accelerator they are pinned, so that a copy to the device can overlap the next read; a buffer is handed out
    again only when the copies out of it are done. Nothing is allocated before the first use.

    Args:
        count: Number of buffers.
        nbytes: Size of each, in bytes.
        device: That the bytes go to.
    """

    def __init__(self, *, count: int, nbytes: int, device: torch.device) -> None:
        self.count = count
        self.nbytes = nbytes
        self._device = device
        self._free: deque[torch.Tensor] = deque()
        self._made = 0
        self._busy: deque[tuple[torch.Tensor, torch.Event]] = deque()

    @property
    def available(self) -> bool:
        """Whether `take` hands out a buffer without waiting for reads that are in progress."""
        return bool(self._free) or bool(self._busy) or self._made < self.count

    def take(self) -> torch.Tensor:
        """Return a free buffer: uint8, `nbytes` long. It must be given back."""
        if not self._free and self._made < self.count:
            self._made += 1
            # One exact allocation each: torch's pinned allocator rounds up to powers of two, which these are. It may open a
            # context on the current device, which must not be another rank's. The host is named, because torch's default device
            # may be another.
            with current(self._device):
                return torch.empty(
                    self.nbytes, dtype=torch.uint8, device="cpu", pin_memory=self._device.type != "cpu"
                )
        if not self._free:
            buffer, copied = self._busy.popleft()
            copied.synchronize()
            return buffer
        return self._free.popleft()

    def give_back(self, buffer: torch.Tensor) -> None:
        """Take a buffer back once the copies out of it that were started so far are done."""
        if self._device.type == "cpu":
            self._free.append(buffer)
        else:
            self._busy.append((buffer, copies_to(self._device)))

    def drain(self) -> None:
        """Wait until all copies out of buffers that were given back are done."""
        while self._busy:
            buffer, copied = self._busy.popleft()
            copied.synchronize()
            self._free.append(buffer)
