"""A profile in a few lines of plain text: one per phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from shardwise.profiling.columns import MemoryPeaks
from shardwise.profiling.phases import PhaseSpan
from shardwise.profiling.traffic import Traffic

_HEADERS: Final = (
    "seconds",
    "anon",
    "file",
    "shared",
    "PSS",
    "device",
    "reserved",
    "fetched",
    "read",
    "received",
)
_INDENT: Final = "  "


def summary(
    phases: Sequence[PhaseSpan],
    *,
    seconds: float,
    peaks: Callable[[float, float], MemoryPeaks],
    traffic: Callable[[float, float], Traffic],
    measures: str,
) -> str:
    """Return the table, with a first row for the whole profile.

    Args:
        phases: In the order of their start.
        seconds: The profile's length.
        peaks: From the start and stop of a span to its peaks.
        traffic: From the start and stop of a span to what came in.
        measures: What exactly the figures are.
    """
    rows: list[tuple[str, ...]] = [("phase", *_HEADERS)]
    for name, start, stop in (
        ("all", 0.0, math.inf),
        *((_INDENT * (1 + span.depth) + span.name, span.start_seconds, span.stop_seconds) for span in phases),
    ):
        peak, came = peaks(start, stop), traffic(start, stop)
        figures = (
            peak.anon_peak_bytes,
            peak.file_peak_bytes,
            peak.shared_peak_bytes,
            peak.pss_peak_bytes,
            peak.device_peak_bytes,
            peak.device_reserved_peak_bytes,
            came.fetched_bytes,
            came.read_bytes,
            came.received_bytes,
        )
        length = seconds if math.isinf(stop) else stop - start
        rows.append((name, f"{length:.2f}", *map(_mebibytes, figures)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(
        (
            *lines,
            "Highest increases over the start, and what came in, in MiB.",
            f"Measured: {measures}.",
        )
    )


def _mebibytes(count_bytes: int | None) -> str:
    return "-" if count_bytes is None else f"{count_bytes / 2**20:,.1f}"
