"""Named parts of a run. Any layer opens one; every memory profile that is active notes it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

from shardwise.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSpan:
    """One run through a phase.

    Args:
        name: The phase's name.
        depth: Number of phases open around it.
        start_seconds: Start, since the profile's start.
        stop_seconds: End, since the profile's start.
    """

    name: str
    depth: int
    start_seconds: float
    stop_seconds: float

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigurationError("phase: expected a name, got an empty one")
        if self.depth < 0:
            raise ConfigurationError(f"phase {self.name!r}: expected a depth of 0 or more, got {self.depth}")
        if not 0.0 <= self.start_seconds <= self.stop_seconds:
            raise ConfigurationError(
                f"phase {self.name!r}: expected 0 <= start <= stop, got start {self.start_seconds} s and "
                f"stop {self.stop_seconds} s"
            )


class PhaseRecorder(Protocol):
    """Notes phases; a memory profile is one."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Note a phase from entry to exit."""


def seconds_by_name(spans: Sequence[PhaseSpan]) -> dict[str, float]:
    """Add up the time of spans by name; time in which a name was open twice counts once.

    Args:
        spans: The spans, in the order of their start.
    """
    totals: dict[str, float] = {}
    counted_until: dict[str, float] = {}
    for span in spans:
        start = max(span.start_seconds, counted_until.get(span.name, 0.0))
        totals[span.name] = totals.get(span.name, 0.0) + max(0.0, span.stop_seconds - start)
        counted_until[span.name] = max(span.stop_seconds, counted_until.get(span.name, 0.0))
    return totals


_active: list[PhaseRecorder] = []


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Note a phase in every memory profile that is active in this process; without one, do nothing.

    Args:
        name: The phase's name. Phases nest; one name may occur again.
    """
    with ExitStack() as stack:
        for recorder in tuple(_active):
            stack.enter_context(recorder.phase(name))
        yield


def activate(recorder: PhaseRecorder) -> None:
    """Let `recorder` note the phases from here on."""
    _active.append(recorder)


def deactivate(recorder: PhaseRecorder) -> None:
    """Stop noting phases in `recorder`."""
    _active[:] = [other for other in _active if other is not recorder]


def active_recorders() -> tuple[PhaseRecorder, ...]:
    """Return the recorders that note phases now, the oldest first."""
    return tuple(_active)


# A forked child has the parent's recorders but not the threads that own their locks.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_active.clear)
