"""Progress and errors on the terminal, and in a pipe."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import typer
from rich.console import Console
from rich.markup import escape

from shardwise.errors import CommandError, ConfigurationError, ShardwiseError

Progress = Callable[[str], None]

STATUS_FAILED: Final = 1
STATUS_USAGE: Final = 2
STATUS_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it


@contextmanager
def terminal_progress() -> Iterator[Progress]:
    """Show what goes on, on stderr: one live line in a terminal, one plain line per message in a pipe."""
    console = Console(stderr=True, highlight=False)
    start = time.monotonic()
    if console.is_terminal:
        with console.status("starting") as status:
            yield lambda message: status.update(escape(message))
        return

    def say(message: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {message}", file=sys.stderr, flush=True)

    yield say


@contextmanager
def temporary_logs() -> Iterator[Path]:
    """Yield a folder for the output of ranks; it stays where they failed, as their error names it."""
    folder = Path(tempfile.mkdtemp(prefix="shardwise-logs-"))
    is_kept = False
    try:
        yield folder
    except CommandError:
        is_kept = True
        raise
    finally:
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def errors_reported(*, debug: bool) -> Iterator[None]:
    """Turn errors into one paragraph on stderr and an exit status.

    Args:
        debug: Show the traceback too.

    What a `KeyboardInterrupt` was made with is said too.

    Raises:
        typer.Exit: With status 2 for wrong options or set-up, 1 for what failed, 130 for an interrupt.
    """
    try:
        yield
    except ConfigurationError as error:
        _report(str(error), debug=debug)
        raise typer.Exit(STATUS_USAGE) from error
    except ShardwiseError as error:
        _report(str(error), debug=debug)
        raise typer.Exit(STATUS_FAILED) from error
    except KeyboardInterrupt as error:
        _report(" ".join(["interrupted; nothing is left running.", *map(str, error.args)]), debug=debug)
        raise typer.Exit(STATUS_INTERRUPTED) from error
    except OSError as error:
        _report(f"{error}.", debug=debug)
        raise typer.Exit(STATUS_FAILED) from error


def _report(message: str, *, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"shardwise: {message}", file=sys.stderr, flush=True)
