"""What a chart of the page shows: lines on a common grid of instants, and the phases behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shardwise.profiling import Figure, Timeline, node_increase
from shardwise.report.legend import shaded_phases

INSTANTS: Final = 200
MOST_LINES: Final = 8  # ranks; more cannot be told apart
_MOST_PHASES: Final = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line.

    Args:
        name: For people.
        style: Class that gives the line its colour.
        values: Bytes above the start at each instant, the highest since the instant before; NaN before the first reading.
        peak_bytes: The highest reading; None where there is none.
        peak_seconds: Its instant.
    """

    name: str
    style: str
    values: NDArray[np.float64]
    peak_bytes: float | None
    peak_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A phase of the lowest rank.

    Args:
        name: The phase's name.
        depth: Number of phases around it.
        start_seconds: Start, on the chart's axis.
        stop_seconds: End, on the chart's axis.
    """

    name: str
    depth: int
    start_seconds: float
    stop_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One figure of one mode over time.

    Args:
        figure: Which memory.
        instants: In seconds since the earliest rank's start.
        lines: Of the ranks, and last of the fullest node's ranks together where there are several.
        left_out: Number of ranks without a line.
        shaded: Phases that are worth a colour.
        phases: All phases, in the order of their start.
    """

    figure: Figure
    instants: NDArray[np.float64]
    lines: tuple[Line, ...]
    left_out: int
    shaded: tuple[Band, ...]
    phases: tuple[Band, ...]


def length_seconds(timelines: Sequence[Timeline]) -> float:
    """Return the time from the earliest start to the last reading of any rank."""
    origin = _origin(timelines)
    return max(
        (float(line.seconds.max(initial=0.0)) + line.started_at_seconds - origin for line in timelines),
        default=0.0,
    )


def series_of(
    timelines: Sequence[Timeline], *, node: Sequence[Timeline], figure: Figure, end_seconds: float
) -> Series | None:
    """Put the timelines of one mode on a grid.

    Args:
        timelines: Of all ranks, in their order.
        node: Of the ranks of the fullest node.
        figure: Which memory.
        end_seconds: End of the grid.

    Returns:
        The series; None where no rank has this figure.
    """
    origin = _origin(timelines)
    instants = np.linspace(0.0, end_seconds, INSTANTS)
    lines = []
    for line in timelines:
        values = line.increases[figure]
        was_read = ~np.isnan(values)
        if was_read.any():
            when = line.seconds[was_read] + (line.started_at_seconds - origin)
            lines.append(
                (line.rank, _line(f"rank {line.rank}", "", when, values[was_read], instants=instants))
            )
    if not lines:
        return None
    shown = {rank for rank, _ in lines}
    if len(lines) > MOST_LINES:
        # Rank 0 is often another case than the rest; of those the highest say most.
        others = sorted(lines[1:], key=lambda each: -(each[1].peak_bytes or 0.0))
        shown = {lines[0][0], *(rank for rank, _ in others[: MOST_LINES - 1])}
    drawn = [line for rank, line in lines if rank in shown]
    styled = [_styled(line, f"rank-{index}") for index, line in enumerate(drawn)]
    if len(node) > 1:
        when, total = node_increase(node, figure)
        when = when + (_origin(node) - origin)
        # A rank counts as 0 before its first reading, which only at the start of a load is what it has.
        all_read = max(
            line.started_at_seconds - origin + float(line.seconds[:1].max(initial=0.0)) for line in node
        )
        when, total = when[when >= all_read], total[when >= all_read]
        words = "all ranks together" if len(node) == len(timelines) else "ranks of the fullest node together"
        styled.append(_line(words, "together", when, total, instants=instants))
    first = timelines[0]
    offset = first.started_at_seconds - origin
    return Series(
        figure=figure,
        instants=instants,
        lines=tuple(styled),
        left_out=len(lines) - len(drawn),
        shaded=tuple(
            Band(
                name=span.name,
                depth=span.depth,
                start_seconds=start,
                stop_seconds=start + span.stop_seconds - span.start_seconds,
            )
            for start, span in shaded_phases(timelines)
        ),
        phases=tuple(
            Band(
                name=span.name,
                depth=span.depth,
                start_seconds=span.start_seconds + offset,
                stop_seconds=span.stop_seconds + offset,
            )
            for span in first.phases[:_MOST_PHASES]
        ),
    )


def on_grid(
    when: NDArray[np.float64], values: NDArray[np.float64], instants: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the highest value since the instant before, else the last one; NaN before the first.

    Args:
        when: Instants of the readings, ascending; shape (readings,).
        values: What was read; shape (readings,).
        instants: The grid; shape (instants,).
    """
    at = np.minimum(np.searchsorted(instants, when, side="left"), instants.size - 1)
    highest = np.full(instants.size, np.nan)
    np.fmax.at(highest, at, values)
    before = np.searchsorted(when, instants, side="right") - 1
    held = np.where(before >= 0, values[np.maximum(before, 0)], np.nan)
    return np.where(np.isnan(highest), held, highest)


def _origin(timelines: Sequence[Timeline]) -> float:
    return min((line.started_at_seconds for line in timelines), default=0.0)


def _line(
    name: str,
    style: str,
    when: NDArray[np.float64],
    values: NDArray[np.float64],
    *,
    instants: NDArray[np.float64],
) -> Line:
    if values.size == 0:
        return Line(
            name=name, style=style, values=np.full(instants.size, np.nan), peak_bytes=None, peak_seconds=0.0
        )
    return Line(
        name=name,
        style=style,
        values=on_grid(when, values, instants),
        peak_bytes=float(values.max()),
        peak_seconds=float(when[values.argmax()]),
    )


def _styled(line: Line, style: str) -> Line:
    return Line(
        name=line.name,
        style=style,
        values=line.values,
        peak_bytes=line.peak_bytes,
        peak_seconds=line.peak_seconds,
    )
