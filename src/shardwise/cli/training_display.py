"""What `shardwise train` shows while it goes on: a bar in a terminal, a line for each step in a pipe."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

_MIB = 2**20


@contextmanager
def training_display() -> Iterator[Callable[[str], None]]:
    """Show what a training announces, on stderr.

    Yields:
        What to call with each line that is announced: a JSON object.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        # It wraps, and is not cut, in a narrow terminal.
        TextColumn("{task.fields[figures]}", table_column=Column(overflow="fold")),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield _Bar(progress)


def figures_of(event: Mapping[str, Any]) -> str:
    """Return a step's figures in a few words."""
    memory = event["peak_memory_bytes"] / _MIB
    return f"loss {event['loss']:.4f}, {event['tokens_per_second']:.0f} tokens/s, peak {memory:.0f} MiB"


class _Lines:
    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, line: str) -> None:
        event = json.loads(line)
        if event["kind"] == "step":
            text = f"step {event['step']} of {event['of']}: {figures_of(event)}"
        else:
            text = _text_of(event)
        print(f"[{time.monotonic() - self._start:6.1f} s] {text}", file=sys.stderr, flush=True)


class _Bar:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None, figures="")

    def __call__(self, line: str) -> None:
        event = json.loads(line)
        if event["kind"] == "step":
            self._progress.update(
                self._task,
                description="step",
                completed=event["step"],
                total=event["of"],
                figures=figures_of(event),
            )
        else:
            self._progress.console.print(Text(_text_of(event)), soft_wrap=True)


def _text_of(event: Mapping[str, Any]) -> str:
    if event["kind"] == "eval":
        return f"step {event['step']}: eval loss {event['loss']:.4f}"
    return str(event["text"])
