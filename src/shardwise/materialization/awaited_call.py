"""Calls that a file system may never answer: on a thread, while this rank listens to the others and counts the time."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

from shardwise.errors import StalledReadError
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.patience import AwakeClock
from shardwise.materialization.reader_threads import ReaderThreads

_log = logging.getLogger("shardwise")
_Result = TypeVar("_Result")
_LOOKS = 20
"""In the time that a call may take, at others' failures."""
_LONGEST_PAUSE_SECONDS = 0.25
_PART_OF_TIMEOUT = 0.75
"""That one call may take: its rank names the file before the others, who wait for it, give up at the timeout."""
SECONDS_FOR_STARTED_CALLS = 2.0
"""After a failure: reads that have started write into shards and buffers, and had better end before these go."""


class Doing:
    """What a thread is at, for whoever waits for it; the time that one step may take begins anew with each.

    Args:
        what: With the file, for messages.
    """

    def __init__(self, what: str) -> None:
        self.now = what, 0

    def begin(self, what: str) -> None:
        """Say that the thread has come to another step."""
        self.now = what, self.now[1] + 1


def await_call(future: Future[_Result], agreement: Agreement, doing: Doing) -> _Result:
    """Wait until a call on a thread returns, another rank fails, or a step of it is overdue.

    Args:
        future: Of the call.
        agreement: Of the call of shardwise.
        doing: What the thread is at.

    Returns:
        What the call returned.

    Raises:
        CheckpointError: The call failed.
        PeerError: Another rank failed.
        StalledReadError: A step has not ended within three quarters of the timeout.
    """
    longest = _PART_OF_TIMEOUT * agreement.timeout_seconds
    warn_after = min(agreement.warn_after_seconds, longest / 2)
    clock, began = AwakeClock(timeout_seconds=longest), 0.0
    known, has_warned = doing.now, False
    while not wait([future], timeout=min(_LONGEST_PAUSE_SECONDS, longest / _LOOKS)).done:
        agreement.check()
        if doing.now != known:
            known, has_warned, began = doing.now, False, clock.seconds()
            agreement.step()
        what, waited = known[0], clock.seconds() - began
        if waited > longest:
            raise StalledReadError(
                f"{what} has not returned for {longest:g} s on rank {agreement.rank} ({socket.gethostname()}). "
                f"Check the disk or the mount there, or pass a longer timeout than {agreement.timeout_seconds:g} s."
            )
        if waited > warn_after and not has_warned:
            has_warned = True
            _log.warning(
                "%s has not returned for %.3g s on rank %d (%s); it goes on waiting for at most %g s (timeout=)",
                what,
                waited,
                agreement.rank,
                socket.gethostname(),
                longest,
            )
    return future.result()


def on_thread(call: Callable[[Doing], _Result], agreement: Agreement, *, what: str) -> _Result:
    """Make one call on a thread of its own, and wait for it.

    Args:
        call: Told where to say what it is at.
        agreement: Of the call of shardwise.
        what: It is at first, with the file, for messages.

    Returns:
        What the call returned.

    Raises:
        As `await_call`.
    """
    doing = Doing(what)
    with calling_threads(1, name="shardwise-open") as threads:
        return await_call(threads.submit(call, doing), agreement, doing)


@contextmanager
def calling_threads(count: int, *, name: str, cpus: frozenset[int] | None = None) -> Iterator[ReaderThreads]:
    """Have threads for calls that are awaited in the body; one that is stuck is left behind.

    Args:
        count: Most threads.
        name: Of the threads, before their number.
        cpus: On which they run; None: on any.
    """
    threads, seconds = ReaderThreads(count, name=name, cpus=cpus), SECONDS_FOR_STARTED_CALLS
    try:
        yield threads
    except StalledReadError:
        seconds = 0.0  # the others wait to be told
        raise
    finally:
        threads.close(within_seconds=seconds)
