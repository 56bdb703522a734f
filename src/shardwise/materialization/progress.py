"""One progress line for the whole job: bytes, rate, time left, slowest rank. Quiet when nobody looks."""

from __future__ import annotations

import json
import sys
import threading
import time
from types import TracebackType
from typing import Self

from shardwise.errors import RankError
from shardwise.materialization.agreement import Agreement

_SECONDS_BETWEEN_REPORTS = 0.5


class JobProgress:
    """Adds up what all ranks have read and shows it on the first rank's terminal.

    Ranks put their byte count into the call's store twice a second, and only where the first rank shows the line. It is opened
    around the phase that reads, so that the line stays while the first rank waits for slower ones.

    Args:
        agreement: Of the call.
        own_bytes: That this rank will read.
        job_bytes: That all ranks will read together.
        show: Whether the first rank shows the line; the same on all ranks.
    """

    def __init__(self, agreement: Agreement, *, own_bytes: int, job_bytes: int, show: bool) -> None:
        self._agreement = agreement
        self._own_bytes = own_bytes
        self._job_bytes = job_bytes
        self._show = show
        self._is_first = agreement.rank == agreement.ranks[0]
        self._read_bytes = 0
        self._last_seconds = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._show and self._is_first:
            self._thread = threading.Thread(target=self._draw, name="shardwise-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def add(self, nbytes: int) -> None:
        """Note that this rank has read so many more bytes."""
        self._read_bytes += nbytes
        self._agreement.step()
        now = time.monotonic()
        is_last = self._read_bytes >= self._own_bytes
        if self._show and (is_last or now - self._last_seconds > _SECONDS_BETWEEN_REPORTS):
            self._last_seconds = now
            self._agreement.note("progress", json.dumps([self._read_bytes, self._own_bytes]))

    def _draw(self) -> None:
        from rich.console import Console  # imported where somebody looks
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("reading"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[slowest]}"),
        )
        console = Console(file=sys.stderr)
        # Where nothing can be erased, what stays is the line of the end.
        with Progress(*columns, console=console, transient=console.is_terminal) as line:
            task = line.add_task("read", total=self._job_bytes, slowest="")
            while True:
                stopping = self._stop.wait(_SECONDS_BETWEEN_REPORTS)
                try:
                    noted = self._agreement.noted("progress")
                except RankError:  # the store is gone; whoever waits for the data says so
                    return
                counts = {rank: json.loads(text) for rank, text in noted.items()}
                if counts:
                    rank = min(counts, key=lambda r: counts[r][0] / max(1, counts[r][1]))
                    share = 100 * counts[rank][0] // max(1, counts[rank][1])
                    line.update(
                        task,
                        completed=sum(read for read, _ in counts.values()),
                        slowest=f"rank {rank} at {share} %" if len(self._agreement.ranks) > 1 else "",
                    )
                if stopping:
                    return


def shown_by_default() -> bool:
    """Return whether this process's standard error is a terminal."""
    return sys.stderr.isatty()
