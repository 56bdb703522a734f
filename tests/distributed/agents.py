"""Launcher agents on this machine, started as the recipes say, each as one machine of a job."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
RECIPES = REPOSITORY / "recipes"
PORTS = range(20000, 30000)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A process that has ended.

    Args:
        status: Its exit status.
        output: Standard output and error.
        seconds: From the start of the first one.
    """

    status: int
    output: str
    seconds: float


def environment(**more: str) -> dict[str, str]:
    """Return an environment in which `torchrun`, `accelerate` and `python` are those of this interpreter."""
    tools = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([tools, os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)]),
        "OMP_NUM_THREADS": "1",
        **more,
    }


def free_port() -> int:
    """Return a port that nobody listens on now, and that the system gives nobody who asks for any."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as one, suppress(OSError):
            one.bind(("", port))
            return port


def run_all(
    commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]], folder: Path, *, seconds: float
) -> list[Ended]:
    """Run processes side by side, and end what is left of all of them after a time.

    Args:
        commands: Their arguments.
        environments: One for each.
        folder: Where their output goes.
        seconds: Longest time.
    """
    logs = [folder / f"process-{number}.log" for number in range(len(commands))]
    started, processes = time.monotonic(), []
    for command, environ, log in zip(commands, environments, logs, strict=True):
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(
                    list(command),
                    env=environ,
                    cwd=REPOSITORY,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    ended = [0.0] * len(processes)
    try:
        while not all(ended) and time.monotonic() - started < seconds:
            for number, process in enumerate(processes):
                if not ended[number] and process.poll() is not None:
                    ended[number] = time.monotonic() - started
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [
        Ended(status=process.returncode, output=log.read_text(), seconds=at or seconds)
        for process, log, at in zip(processes, logs, ended, strict=True)
    ]
