"""Threads that read: results and errors, what is cancelled, and a process that ends although one is stuck."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError
from queue import SimpleQueue
from typing import Any

import pytest

from shardwise.materialization import reader_threads
from shardwise.materialization.reader_threads import ReaderThreads

NAME = "read-in-these-tests"  # and in no others, whose threads may still be there


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(NAME)]


def meet(together: threading.Barrier, number: int) -> int:
    together.wait()
    return number


def test_calls_run_at_the_same_time_and_end_with_their_threads() -> None:
    threads = ReaderThreads(3, name=NAME)
    together = threading.Barrier(3, timeout=60)
    futures = [threads.submit(meet, together, number) for number in range(3)]
    assert [future.result(timeout=60) for future in futures] == [0, 1, 2]
    assert len(readers()) == 3
    assert threads.close(within_seconds=60)
    assert readers() == []


def test_no_more_threads_than_are_needed() -> None:
    threads = ReaderThreads(8, name=NAME)
    threads.submit(time.sleep, 0).result(timeout=60)
    assert len(readers()) == 1
    assert threads.close(within_seconds=60)


def fail() -> None:
    raise OSError("no such share")


def test_an_error_is_the_futures() -> None:
    threads = ReaderThreads(1, name=NAME)
    failing = threads.submit(fail)
    with pytest.raises(OSError, match="no such share"):
        failing.result(timeout=60)
    threads.submit(time.sleep, 0).result(timeout=60)  # the thread goes on
    assert threads.close(within_seconds=60)


def test_what_has_not_begun_is_cancelled_and_what_is_stuck_is_left() -> None:
    threads, release = ReaderThreads(1, name=NAME), threading.Event()
    stuck = threads.submit(release.wait)
    waiting = threads.submit(fail)
    started = time.monotonic()
    assert not threads.close(within_seconds=0.2)
    assert time.monotonic() - started < 30
    with pytest.raises(CancelledError):
        waiting.result(timeout=60)
    assert not stuck.done()
    release.set()
    assert threads.close(within_seconds=60)
    assert readers() == []


class Contested(SimpleQueue[Any]):
    """A queue of which another thread takes the next call between a look at it and the taking."""

    def empty(self) -> bool:
        if super().empty():
            return True
        self.get_nowait()
        return False


def test_closing_does_not_wait_for_a_call_that_a_thread_takes_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reader_threads, "SimpleQueue", Contested)
    threads, release = ReaderThreads(1, name=NAME), threading.Event()
    busy = threads.submit(release.wait)
    deadline = time.monotonic() + 60
    while not busy.running() and time.monotonic() < deadline:
        time.sleep(0.01)
    threads.submit(fail)
    closing = threading.Thread(target=threads.close, kwargs={"within_seconds": 0.1}, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()
    release.set()
    assert threads.close(within_seconds=60)


class Buffer:
    """Something that can be watched."""


def test_a_thread_that_waits_keeps_no_buffer() -> None:
    threads, buffer = ReaderThreads(1, name=NAME), Buffer()
    watched = weakref.ref(buffer)
    assert (
        threads.submit(lambda given: given, buffer).result(timeout=60) is buffer
    )  # nor what a call returned
    del buffer
    deadline = time.monotonic() + 60
    while watched() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watched() is None
    assert threads.close(within_seconds=60)


def test_a_process_ends_although_a_read_is_stuck() -> None:
    program = (
        "import threading\n"
        "from shardwise.materialization.reader_threads import ReaderThreads\n"
        "threads = ReaderThreads(1, name='stuck')\n"
        "threads.submit(threading.Event().wait)\n"
        "print(threads.close(within_seconds=0.1))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True
    )
    assert done.stdout == "False\n"
