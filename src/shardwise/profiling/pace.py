"""How often a reading that costs real time may be taken."""

from __future__ import annotations


class CostPace:
    """Spaces readings so that their processor time is no more than a fixed share of the wall-clock time.

    Args:
        share: Largest part of the time to spend, in (0, 1).
        gap_seconds: Shortest time between two readings that the clock asks for.
    """

    __slots__ = ("_affordable_at", "_gap_seconds", "_share", "_wanted_at")

    def __init__(self, *, share: float, gap_seconds: float) -> None:
        self._share = share
        self._gap_seconds = gap_seconds
        self._affordable_at = 0.0  # seconds since the profile's start
        self._wanted_at = 0.0

    def is_wanted(self, now_seconds: float) -> bool:
        """Return whether the gap has passed, and the share allows another reading."""
        return now_seconds >= self._wanted_at and self.is_affordable(now_seconds)

    def is_affordable(self, now_seconds: float) -> bool:
        """Return whether the share allows another reading, however short the gap."""
        return now_seconds >= self._affordable_at

    def spent(self, *, now_seconds: float, cost_seconds: float) -> None:
        """Take note of a reading that ended at `now_seconds` and took `cost_seconds` of processor time."""
        self._wanted_at = now_seconds + self._gap_seconds
        self._affordable_at = now_seconds + cost_seconds / self._share
