"""One look at everything that a profile records, each figure as often as its cost allows."""

from __future__ import annotations

import time
from typing import Final

import torch

from shardwise.profiling.columns import FIELDS, NOT_READ, Row
from shardwise.profiling.device import device_reader
from shardwise.profiling.pace import CostPace
from shardwise.profiling.readings import host_reader
from shardwise.profiling.traffic import TrafficReader

_PSS_EVERY: Final = 20  # samples
_TRAFFIC_EVERY: Final = 50  # samples; counters lose nothing by it
# Of a core, so that with the samples themselves it is less than 0.01: the kernel walks every page for the proportional set size,
# and allocators build a dictionary of statistics.
_PSS_SHARE: Final = 0.001
_DEVICE_SHARE: Final = 0.0025
_TRAFFIC_SHARE: Final = 0.0005
_PHASE_SHARE: Final = 0.025  # at a phase's ends, which are few and tell most
_NOTHING: Final = (NOT_READ,) * (len(FIELDS) - 3)


class RowReader:
    """Reads host memory, device memory and traffic of this process.

    Args:
        device: See `profile_memory`.
        interval_seconds: Time between two samples.
        proportional: See `profile_memory`.

    Raises:
        ConfigurationError: The platform gives no memory figures.
    """

    def __init__(
        self, *, device: torch.device | str | int | None, interval_seconds: float, proportional: bool
    ) -> None:
        self._host = host_reader(proportional=proportional)
        self._device, device_measures = device_reader(device)
        self._traffic = TrafficReader()
        parts = (self._host.measures, device_measures, self._traffic.measures)
        self._measures = "; ".join(part for part in parts if part)
        self._pss_pace = CostPace(share=_PSS_SHARE, gap_seconds=_PSS_EVERY * interval_seconds)
        self._device_pace = CostPace(share=_DEVICE_SHARE, gap_seconds=0.0)
        self._traffic_pace = CostPace(share=_TRAFFIC_SHARE, gap_seconds=_TRAFFIC_EVERY * interval_seconds)
        paces = (self._pss_pace, self._traffic_pace)
        self._paces = paces if self._device is None else (*paces, self._device_pace)
        self._costly_due_seconds = 0.0  # since the profile's start

    @property
    def measures(self) -> str:
        """What exactly the figures are on this platform."""
        return self._measures

    @property
    def has_device(self) -> bool:
        """Whether there is device memory to read."""
        return self._device is not None

    def reset_device_peak(self) -> None:
        """Make the device allocator's highest value equal to its present one."""
        if self._device is not None:
            self._device.reset_peak()

    def read(self, now_seconds: float, *, all_figures: bool | None) -> Row:
        """Read now.

        Args:
            now_seconds: Time since the profile's start.
            all_figures: True reads everything; False, at a phase's end, what is affordable; None what is due.

        Raises:
            OSError: The system refuses.
        """
        # Most samples end here, a thread that wakes up finds cold caches, and little code is quick then.
        if all_figures is None and now_seconds < self._costly_due_seconds:
            return (now_seconds, *self._host.read_often(), *_NOTHING)
        host = self._host.read()
        pss = self._pss(now_seconds, all_figures=all_figures)
        # A phase's ends always have these: between them the allocator's own peak is exact, and so is what came in.
        device: tuple[float, float, float] = (NOT_READ, NOT_READ, NOT_READ)
        if self._device is not None and (all_figures is not None or self._device_pace.is_wanted(now_seconds)):
            before = time.thread_time()
            device = self._device.read()
            self._device_pace.spent(now_seconds=now_seconds, cost_seconds=time.thread_time() - before)
        traffic: tuple[float, float, float] = (NOT_READ, NOT_READ, NOT_READ)
        if all_figures is not None or self._traffic_pace.is_wanted(now_seconds):
            before = time.thread_time()
            traffic = self._traffic.read()
            self._traffic_pace.spent(now_seconds=now_seconds, cost_seconds=time.thread_time() - before)
        self._costly_due_seconds = min(pace.due_seconds for pace in self._paces)
        return (now_seconds, *host, NOT_READ if pss is None else pss, *device, *traffic)

    def close(self) -> None:
        """Give back what the readers hold."""
        self._host.close()
        self._traffic.close()

    def _pss(self, now_seconds: float, *, all_figures: bool | None) -> int | None:
        pace = self._pss_pace
        is_due = (
            pace.is_wanted(now_seconds)
            if all_figures is None
            else all_figures or pace.is_affordable(now_seconds, share=_PHASE_SHARE)
        )
        if not is_due:
            return None
        before = time.thread_time()
        pss = self._host.read_pss()
        pace.spent(now_seconds=now_seconds, cost_seconds=time.thread_time() - before)
        return pss
