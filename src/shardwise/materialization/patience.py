"""How long a rank waits: until nothing has moved on any rank for the timeout, not until everything is done."""

from __future__ import annotations

import time
from typing import Protocol

_LOOKS = 10
_LONGEST_TICK_SECONDS = 5.0
_TICKS = 4
"""In a timeout, at least, of a clock that is looked at all the time."""


class AwakeClock:
    """Seconds that this process was awake, as far as one that looks at the clock all the time can tell.

    A process that is stopped for a while, with the whole job or alone, has not waited meanwhile. Of the time between two looks no
    more than a few seconds count, so that it goes on waiting when it is continued.

    Args:
        timeout_seconds: That is measured; at most a fourth of it counts between two looks.
    """

    def __init__(self, *, timeout_seconds: float) -> None:
        self._longest_tick = min(_LONGEST_TICK_SECONDS, timeout_seconds / _TICKS)
        self._looked_at = time.monotonic()
        self._seconds = 0.0

    def seconds(self) -> float:
        """Return the seconds since it was made."""
        now = time.monotonic()
        self._seconds += min(self._longest_tick, now - self._looked_at)
        self._looked_at = now
        return self._seconds


class Moving(Protocol):
    """What counts the steps that ranks make."""

    timeout_seconds: float

    def steps(self) -> int:
        """Return how many steps all ranks have made so far."""


class Patience:
    """Time since something last moved, as far as one waiting rank knows.

    Args:
        of: Counts the steps, and has the timeout.
    """

    def __init__(self, of: Moving) -> None:
        self._of = of
        self._clock = AwakeClock(timeout_seconds=of.timeout_seconds)
        self._moved_at = self._looked_at = 0.0
        self._seen: int | None = None

    def is_over(self) -> bool:
        """Return whether no rank has made a step for the timeout. Asks for steps ten times in a timeout."""
        now = self._clock.seconds()
        if now - self._looked_at > self._of.timeout_seconds / _LOOKS:
            self._looked_at = now
            steps = self._of.steps()
            if self._seen is not None and steps != self._seen:
                self._moved_at = now
            self._seen = steps
        return now - self._moved_at > self._of.timeout_seconds
