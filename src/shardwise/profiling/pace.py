"""How often a reading that costs real time may be taken."""

from __future__ import annotations

import math
from typing import Final

_MOST_INTERVALS: Final = 8  # between two samples
_HANDED_OVER_SECONDS: Final = (
    0.0006  # what a thread that computes in Python loses to each sample; see docs/design.md
)
_HANDING_OVER: Final = (
    0.9,
    1.5,
)  # of the interpreter's switch interval: it is that late where the lock was handed over


def handing_over_seconds(late_seconds: float, *, switch_seconds: float) -> float:
    """Return what another thread has lost to a sample that came so late: it was made to hand over the interpreter lock, or nothing.

    Args:
        late_seconds: From when the sample was due to when it was taken.
        switch_seconds: The interpreter's switch interval, for which it lets a thread wait that asks for the lock.
    """
    least, most = _HANDING_OVER
    handed_over = least * switch_seconds <= late_seconds <= most * switch_seconds
    return _HANDED_OVER_SECONDS if handed_over else 0.0


def next_sample_seconds(
    *, now_seconds: float, interval_seconds: float, thread_seconds: float, share: float
) -> float:
    """Return when to sample next, since the profile's start.

    The answer lies on a fixed grid: what one sample costs delays no later one, and what was missed is not made
    up. Where wake-ups are dear (a crowded machine) it is later, so that the thread keeps to its share, but by a few
    intervals at most: a profile must not be blind to save time.

    Args:
        now_seconds: Time since the profile's start.
        interval_seconds: Width of the grid.
        thread_seconds: Processor time that the sampling thread has used so far, and others have lost to it.
        share: Largest part of the time that it should use, in (0, 1).
    """
    on_grid = (math.floor(now_seconds / interval_seconds) + 1) * interval_seconds
    return max(on_grid, min(thread_seconds / share, now_seconds + _MOST_INTERVALS * interval_seconds))


class CostPace:
    """Spaces readings so that their processor time is no more than a share of the wall-clock time.

    Args:
        share: Largest part of the time that readings asked for by the clock may take, in (0, 1).
        gap_seconds: Shortest time between two readings that the clock asks for.
    """

    __slots__ = ("_cost_seconds", "_gap_seconds", "_last_seconds", "_share")

    def __init__(self, *, share: float, gap_seconds: float) -> None:
        self._share = share
        self._gap_seconds = gap_seconds
        self._last_seconds = -math.inf  # since the profile's start
        self._cost_seconds = 0.0

    @property
    def due_seconds(self) -> float:
        """When the next reading is wanted, since the profile's start."""
        return self._last_seconds + max(self._gap_seconds, self._cost_seconds / self._share)

    def is_wanted(self, now_seconds: float) -> bool:
        """Return whether the gap has passed, and the share allows another reading."""
        return now_seconds >= self.due_seconds

    def is_affordable(self, now_seconds: float, *, share: float) -> bool:
        """Return whether another reading stays within `share` of the time since the last, however short the gap."""
        return now_seconds - self._last_seconds >= self._cost_seconds / share

    def spent(self, *, now_seconds: float, cost_seconds: float) -> None:
        """Take note of a reading that ended at `now_seconds` and took `cost_seconds` of processor time."""
        self._last_seconds = now_seconds
        self._cost_seconds = cost_seconds
