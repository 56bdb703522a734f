"""A pool of local processes that run functions as ranks of gloo process groups.

Starting a process and importing torch takes seconds; a pool pays that once and gives each run a fresh default group.
On Linux one server pays it for all pools of a process, and its ranks are forks of it: one that was lost is made anew in milliseconds.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shardwise.errors import CommandError

_MOST_SECONDS_AT_THE_END = 2.0  # to wait for ranks that work on


class RankFailedError(AssertionError):
    """A function failed on at least one rank; the message holds every rank's traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    module: str
    function: str
    args: tuple[Any, ...]
    rank: int
    world_size: int
    store_file: str
    group_timeout_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    value: Any
    error: BaseException | None
    traceback: str


class RankPool:
    """Processes that wait for functions to run as ranks.

    Use as a context manager, or call `close`.

    Args:
        size: Most ranks that a run may have.
        preload: Modules that each process has imported at its start. On Linux, the first pool of a process decides what the server
            of all its pools imports, and ranks of later pools import what is missing. None may start a thread or initialise an
            accelerator.
    """

    def __init__(self, size: int, *, preload: Sequence[str] = ("torch", "transformers")) -> None:
        self.size = size
        self._preload = tuple(preload)
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks: int,
        timeout_seconds: float = 120.0,
    ) -> list[Any]:
        """Run a function on ranks 0 to `ranks - 1` and return their results.

        Args:
            function: Defined at the top level of an importable module.
            *args: Picklable; the same for every rank. The function finds its rank in the default group.
            ranks: Number of ranks, at most the pool's size.
            timeout_seconds: After it the processes are killed.

        Returns:
            One picklable result per rank, in the order of ranks.

        Raises:
            RankFailedError: A rank raised, ended, or did not finish in time.
        """
        outcomes = self._run(function, args, ranks, timeout_seconds)
        failed = [rank for rank, outcome in enumerate(outcomes) if outcome.error is not None]
        if failed:
            traces = "\n".join(f"--- rank {rank} ---\n{outcomes[rank].traceback}" for rank in failed)
            raise RankFailedError(f"{function.__name__} failed on ranks {failed} of {ranks}\n{traces}")
        return [outcome.value for outcome in outcomes]

    def run_to_errors(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks: int,
        timeout_seconds: float = 120.0,
    ) -> list[BaseException | None]:
        """Run a function that is expected to raise; return each rank's exception, or None where it returned."""
        return [outcome.error for outcome in self._run(function, args, ranks, timeout_seconds)]

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(None)
            connection.close()
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._connections = [], []

    def _run(
        self, function: Callable[..., Any], args: tuple[Any, ...], ranks: int, timeout_seconds: float
    ) -> list[_Outcome]:
        if not 1 <= ranks <= self.size:
            raise CommandError(f"rank pool: expected 1 to {self.size} ranks, got {ranks}")
        self._start(ranks)
        with tempfile.TemporaryDirectory(prefix="rank-pool-") as folder:
            for rank in range(ranks):
                task = _Task(
                    module=function.__module__,
                    function=function.__qualname__,
                    args=args,
                    rank=rank,
                    world_size=ranks,
                    store_file=str(Path(folder) / "store"),
                    group_timeout_seconds=timeout_seconds,
                )
                self._connections[rank].send(task)
            return self._collect(ranks, timeout_seconds)

    def _collect(self, ranks: int, timeout_seconds: float) -> list[_Outcome]:
        deadline = time.monotonic() + timeout_seconds
        outcomes: dict[int, _Outcome] = {}
        while len(outcomes) < ranks and time.monotonic() < deadline:
            missing = [rank for rank in range(ranks) if rank not in outcomes]
            left_seconds = max(0.0, deadline - time.monotonic())
            ready = wait([self._connections[rank] for rank in missing], timeout=left_seconds)
            for rank in missing:
                if self._connections[rank] in ready:
                    outcomes[rank] = self._receive(rank)
        late = [rank for rank in range(ranks) if rank not in outcomes]
        for rank in late:
            outcomes[rank] = _lost(f"rank {rank} did not finish within {timeout_seconds:g} s")
        if any(isinstance(outcome.error, _LostError) for outcome in outcomes.values()):
            self._kill()
        return [outcomes[rank] for rank in range(ranks)]

    def _receive(self, rank: int) -> _Outcome:
        try:
            outcome: _Outcome = self._connections[rank].recv()
        except (EOFError, OSError):
            return _lost(f"rank {rank} ended with exit code {self._exit_code(rank)}")
        return outcome

    def _exit_code(self, rank: int) -> int | None:
        self._processes[rank].join(timeout=30)
        code: int | None = self._processes[rank].exitcode
        return code

    def _start(self, ranks: int) -> None:
        context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        context.set_forkserver_preload(list(self._preload))
        while len(self._processes) < ranks:
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(there, self._preload, list(sys.path), dict(os.environ)),
                daemon=True,
                name="rank",
            )
            with _one_thread():  # of the server, which is to be forked
                process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []


class _LostError(RankFailedError):
    """A process ended or hung without an answer."""


def _lost(text: str) -> _Outcome:
    return _Outcome(value=None, error=_LostError(text), traceback=text)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _serve(
    connection: Connection, preload: tuple[str, ...], path: list[str], environment: dict[str, str]
) -> None:
    gc.freeze()  # a collection would write to, and so copy, every page that is shared with the server
    sys.path[:] = path
    os.environ.clear()  # the server's is that of the first pool
    os.environ.update(environment)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in preload:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    frozen = 0
    while True:
        if len(sys.modules) > frozen:
            # What is imported stays: without it, the collection after each run takes far less time.
            frozen = len(sys.modules)
            gc.collect()
            gc.freeze()
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        if task is None:
            return
        connection.send(_execute(task))


def _execute(task: _Task) -> _Outcome:
    import torch
    import torch.distributed as dist

    environment = dict(os.environ)
    store = torch._C._distributed_c10d.FileStore(task.store_file, task.world_size)
    try:
        # As a launcher would set them; the group itself meets through the file.
        os.environ.update(
            RANK=str(task.rank),
            LOCAL_RANK=str(task.rank),
            WORLD_SIZE=str(task.world_size),
            LOCAL_WORLD_SIZE=str(task.world_size),
        )
        dist.init_process_group(
            "gloo",
            store=store,
            rank=task.rank,
            world_size=task.world_size,
            timeout=timedelta(seconds=task.group_timeout_seconds),
        )
        _meet(store, "start", task, timeout_seconds=task.group_timeout_seconds)
        target: Any = importlib.import_module(task.module)
        for part in task.function.split("."):
            target = getattr(target, part)
        outcome = _Outcome(value=target(*task.args), error=None, traceback="")
        pickle.dumps(outcome)
        _meet(store, "end", task, timeout_seconds=_MOST_SECONDS_AT_THE_END)
    except BaseException as error:
        outcome = _Outcome(value=None, error=_picklable(error), traceback=traceback.format_exc())
        store.add("end", 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        _forget_accelerate()
        _forget_meshes()
        os.environ.clear()
        os.environ.update(environment)
        gc.collect()
    return outcome


def _meet(store: Any, name: str, task: _Task, *, timeout_seconds: float) -> None:
    # A rank that closes its group while others still connect to it, or read from it, would fail theirs.
    store.add(name, 1)
    deadline = time.monotonic() + timeout_seconds
    while store.add(name, 0) < task.world_size and time.monotonic() < deadline:
        time.sleep(0.002)


def _picklable(error: BaseException) -> BaseException:
    try:
        copy: BaseException = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:
        return RankFailedError(f"{type(error).__name__}: {error}")
    return copy


def _forget_accelerate() -> None:
    # Accelerate keeps its state for the life of a process; the next run is another job.
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def _forget_meshes() -> None:
    # DTensor caches what it worked out for a mesh, with that mesh; an equal one of the next run has other groups.
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import _redistribute
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
        _redistribute._gen_transform_infos.cache_clear()
        # A planner keeps its mesh, and so its groups.
        if hasattr(_redistribute, "clear_redistribute_planner_cache"):
            _redistribute.clear_redistribute_planner_cache()
