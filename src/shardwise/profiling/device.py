"""Device memory, from the statistics that the device's own caching allocator keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

_NEEDED: Final = ("memory_allocated", "memory_reserved", "max_memory_allocated", "reset_peak_memory_stats")
_STATS_KEYS: Final = ("allocated_bytes.all.current", "reserved_bytes.all.current", "allocated_bytes.all.peak")


class DeviceReader:
    """Reads the allocator statistics of one accelerator.

    The device's module is found by its type (`torch.get_device_module`), so that any backend that keeps
    these statistics under the usual names is measured.
    """

    __slots__ = ("_device", "_module")

    def __init__(self, *, device: torch.device, module: Any) -> None:
        self._device = device
        self._module = module

    @property
    def measures(self) -> str:
        """What exactly the figures are, in one phrase."""
        return f"device: bytes in live tensors by the allocator's statistics of {self._device}"

    def reset_peak(self) -> None:
        """Make the allocator's highest value equal to its present one."""
        is_initialized: Callable[[], bool] | None = getattr(self._module, "is_initialized", None)
        # Before its first use a device has no peak, and to reset one would start the device.
        if is_initialized is None or is_initialized():
            self._module.reset_peak_memory_stats(self._device)

    def read(self) -> tuple[int, int, int]:
        """Return bytes allocated, bytes reserved, and the highest bytes allocated since `reset_peak`."""
        stats = self._module.memory_stats(self._device) if hasattr(self._module, "memory_stats") else {}
        # One call where it will do: each of the three below builds the whole dictionary again.
        if all(key in stats for key in _STATS_KEYS):
            allocated, reserved, peak = (int(stats[key]) for key in _STATS_KEYS)
            return allocated, reserved, peak
        return (
            int(self._module.memory_allocated(self._device)),
            int(self._module.memory_reserved(self._device)),
            int(self._module.max_memory_allocated(self._device)),
        )


def device_reader(device: torch.device | str | int | None) -> tuple[DeviceReader | None, str]:
    """Find out how the memory of `device` can be read.

    Args:
        device: An accelerator; None for this process's current one, if there is any. A CPU has no
            memory of its own: it is no error, and nothing is read. The device is not started.

    Returns:
        The reader (None where there is nothing to read), and what is measured, in one phrase ("" for a CPU).
    """
    if device is None:
        current = torch.accelerator.current_accelerator(check_available=True)
        if current is None:
            return None, ""
        chosen = torch.device(current.type, torch.accelerator.current_device_index())
    else:
        chosen = torch.device(device)
    module = torch.get_device_module(chosen)
    if not all(hasattr(module, name) for name in _NEEDED):
        accelerator = torch.accelerator.current_accelerator()
        is_accelerator = accelerator is not None and accelerator.type == chosen.type
        return None, f"device: not measured, {chosen} keeps no statistics" if is_accelerator else ""
    reader = DeviceReader(device=chosen, module=module)
    return reader, reader.measures
