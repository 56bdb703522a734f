"""How much memory this process has had, for a figure at each step."""

from __future__ import annotations

import torch

from shardwise.profiling import device_reader, host_reader


class PeakMemory:
    """The highest memory so far: of an accelerator by its allocator, else anonymous host memory as seen when looked at.

    Args:
        device: Of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, _ = device_reader(device)
        self._host = host_reader()
        self._peak_bytes = 0
        if self._device is not None:
            self._device.reset_peak()

    def look(self) -> int:
        """Return the highest number of bytes so far."""
        now = self._host.read()[0] if self._device is None else self._device.read()[2]
        self._peak_bytes = max(self._peak_bytes, now)
        return self._peak_bytes
