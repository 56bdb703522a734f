"""Start local ranks through torch's elastic launcher, or take part where the ranks are there already."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from shardwise.compare.announce import PROGRESS_FILE_VARIABLE, Progress, follow
from shardwise.compare.failure import first_failure
from shardwise.compare.rank import Worker, result_file, worker_path
from shardwise.compare.rank import __file__ as rank_program
from shardwise.errors import CommandError, ConfigurationError

_MONITOR_INTERVAL_SECONDS: Final = 0.05
_ELASTIC_LOGGER: Final = "torch.distributed.elastic"
GRACE_SECONDS: Final = 10
"""That ranks have to leave when this process is told to; torch's own default is 30 s."""
_STATUS_OF_SIGNAL_0: Final = 128  # as shells have it
_HANDLED_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def is_rank(environ: Mapping[str, str]) -> bool:
    """Return whether this process was started as a rank (torchrun, accelerate launch, a scheduler's wrapper)."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def refuse_inside_launcher(command: str, *, environ: Mapping[str, str]) -> None:
    """Refuse a command that has to start its own ranks where the ranks were started already.

    Args:
        command: What the user ran, for the message.
        environ: The environment to look at.

    Raises:
        ConfigurationError: This process is a rank itself.
    """
    if is_rank(environ):
        raise ConfigurationError(
            f"{command}: expected to be started as one plain process, got rank {environ['RANK']} of "
            f"{environ['WORLD_SIZE']} (RANK and WORLD_SIZE are set). It starts fresh ranks for each mode: run it "
            "without torchrun or accelerate launch, and give the number of ranks with --ranks."
        )


def run_ranks(
    worker: Worker,
    arguments: Mapping[str, Any],
    *,
    ranks: int,
    log_directory: Path,
    progress: Progress,
    grace_seconds: int = GRACE_SECONDS,
) -> dict[int, Any]:
    """Call `worker(arguments)` on every rank, and wait for all of them.

    Where this process is a rank itself, the ranks are there already: the worker is called here, and only
    this rank's result is returned. Else `ranks` fresh processes are started on this machine, which ends
    with all of them gone.

    Args:
        worker: A module-level function. It finds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
            MASTER_PORT in its environment, and makes its own process group.
        arguments: What it is called with; what JSON can hold.
        ranks: Number of processes to start.
        log_directory: Where each rank's output and error are kept, in a folder of this run, in one folder per rank.
        progress: Called, from another thread, with what rank 0 announces.
        grace_seconds: That ranks have to leave when this process is told to, unless TORCH_ELASTIC_SHUTDOWN_TIMEOUT says otherwise.

    Returns:
        What the worker returned, by rank.

    Raises:
        CommandError: A rank failed; the message has the first failing rank's error.
        KeyboardInterrupt: This process was interrupted; the ranks were stopped.
        SystemExit: Another signal ended this process; the ranks were stopped. The status is 128 and its number.
        ConfigurationError: `ranks` is less than one.
    """
    if is_rank(os.environ):
        with _heard_here(progress):
            return {int(os.environ["RANK"]): worker(arguments)}
    if ranks < 1:
        raise ConfigurationError(f"ranks: expected 1 or more, got {ranks}. Give --ranks 1 or more.")
    log_directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        exchange = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardwise-")))
        request = exchange / "request.json"
        request.write_text(
            json.dumps(
                {
                    "worker": worker_path(worker),
                    "arguments": dict(arguments),
                    "import_path": list(map(str, sys.path)),
                }
            ),
            encoding="utf-8",
        )
        stack.enter_context(_quiet_elastic_logs())
        stack.enter_context(_own_signal_handlers_back())
        stack.enter_context(
            _rank_environment(progress_file=exchange / "progress", grace_seconds=grace_seconds)
        )
        stack.enter_context(follow(exchange / "progress", progress))
        _launch(request, ranks=ranks, log_directory=log_directory, name=worker.__name__)
        return {
            rank: json.loads(result_file(exchange, rank=rank).read_text(encoding="utf-8"))
            for rank in range(ranks)
        }


@contextmanager
def _heard_here(progress: Progress) -> Iterator[None]:
    """Under another launcher: hear what rank 0 announces in its own process."""
    if os.environ["RANK"] != "0" or PROGRESS_FILE_VARIABLE in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="shardwise-") as folder:
        file = Path(folder) / "progress"
        os.environ[PROGRESS_FILE_VARIABLE] = str(file)
        try:
            with follow(file, progress):
                yield
        finally:
            del os.environ[PROGRESS_FILE_VARIABLE]


def _launch(request: Path, *, ranks: int, log_directory: Path, name: str) -> None:
    # Runs may have their logs in one folder: each has its own in it, of a name that tells them apart and when they began.
    run = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
    logs = DefaultLogsSpecs(log_dir=str(log_directory))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=run,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        local_addr="localhost",  # the machine's own name need not resolve
        max_restarts=0,
        monitor_interval=_MONITOR_INTERVAL_SECONDS,
        logs_specs=logs,
    )
    try:
        # -P: the folder of the file is not to be searched for modules.
        elastic_launch(config, sys.executable)("-P", rank_program, str(request))
    except ChildFailedError as error:
        unfinished = [rank for rank in range(ranks) if not result_file(request.parent, rank=rank).exists()]
        (own_logs,) = log_directory.glob(f"{run}_*")
        found = first_failure(error, log_directory=own_logs, unfinished=unfinished)
        raise CommandError(
            f"{name}: rank {found.rank} of {ranks} failed first: {found.message} "
            f"The output of every rank is in {own_logs}."
        ) from error
    except SignalException as error:
        # Not an error of the ranks: whoever sent it wants this process gone, and not the next mode.
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise SystemExit(_STATUS_OF_SIGNAL_0 + error.sigval) from error


@contextmanager
def _rank_environment(*, progress_file: Path, grace_seconds: int) -> Iterator[None]:
    # The ranks inherit this process's environment. One thread each, as torchrun does: the cores are shared.
    added = {PROGRESS_FILE_VARIABLE: str(progress_file)}
    defaults = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace_seconds)}
    added |= {name: value for name, value in defaults.items() if name not in os.environ}
    # The launcher sets this one itself, and leaves it.
    touched = [*added, "TORCHELASTIC_SIGNALS_TO_HANDLE"]
    before = {name: os.environ.get(name) for name in touched}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _own_signal_handlers_back() -> Iterator[None]:
    # The launcher installs handlers that raise its own exception, and leaves them.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _HANDLED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _quiet_elastic_logs() -> Iterator[None]:
    # The launcher logs a failed rank's traceback; the error raised here says it once.
    loggers = [
        logging.getLogger(name)
        for name in tuple(logging.root.manager.loggerDict)
        if name.startswith(_ELASTIC_LOGGER)
    ]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)
