"""Threads that read: a rank can leave one behind that is stuck in the system, and still end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from shardwise.materialization.cpus import keep_to

_Result = TypeVar("_Result")
_Job = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class ReaderThreads:
    """A few daemon threads, started as they are needed.

    The executor of the standard library is of no use here: the interpreter waits for its threads when it ends, and a read from a
    mount that is gone may never return.

    Args:
        count: Most threads.
        name: Of the threads, before their number.
        cpus: On which they run; None: on any.
    """

    def __init__(self, count: int, *, name: str, cpus: frozenset[int] | None = None) -> None:
        self._count = count
        self._name = name
        self._cpus = cpus
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, function: Callable[..., _Result], *args: Any) -> Future[_Result]:
        """Call a function on a thread."""
        future: Future[_Result] = Future()
        self._jobs.put((future, function, args))
        if len(self._threads) < self._count:
            name = f"{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=_work, args=(self._jobs, self._cpus), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def close(self, *, within_seconds: float) -> bool:
        """Begin no further call, and wait for those that run.

        Args:
            within_seconds: Longest wait. A thread that is stuck is left; what it writes into lives as long as it does.

        Returns:
            Whether all threads have ended.
        """
        with suppress(Empty):
            while True:  # a thread may take the last one after any look at the queue
                job = self._jobs.get_nowait()
                if job is not None:
                    job[0].cancel()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + within_seconds
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


def _work(jobs: SimpleQueue[_Job | None], cpus: frozenset[int] | None) -> None:
    keep_to(cpus)
    while (job := jobs.get()) is not None:
        future, function, args = job
        if future.set_running_or_notify_cancel():
            try:
                result = function(*args)
            except BaseException as error:  # for whoever waits for the result
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
        del (
            job,
            future,
            function,
            args,
        )  # else the last buffer would live while the thread waits for the next one
