"""How long a rank waits: until nothing has moved on any rank for the timeout, not until everything is done."""

from __future__ import annotations

import time
from typing import Protocol

_LOOKS = 10


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
        self._moved_at = self._looked_at = time.monotonic()
        self._seen: int | None = None

    def is_over(self) -> bool:
        """Return whether no rank has made a step for the timeout. Asks for steps ten times in a timeout."""
        now = time.monotonic()
        if now - self._looked_at > self._of.timeout_seconds / _LOOKS:
            self._looked_at = now
            steps = self._of.steps()
            if self._seen is not None and steps != self._seen:
                self._moved_at = now
            self._seen = steps
        return now - self._moved_at > self._of.timeout_seconds
