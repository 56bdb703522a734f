"""One panel of the picture: the memory of one mode over time."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from shardwise.profiling import Figure, Timeline, node_increase, node_peak_bytes
from shardwise.report.comparison import Run
from shardwise.report.legend import (
    NODE_COLOUR,
    NODE_DASHES,
    SHARD_COLOUR,
    SHARD_WIDTH,
    phase_colour,
    rank_colour,
    rank_width,
    shaded_phases,
    together_label,
)
from shardwise.report.timelines import LOAD_PHASES
from shardwise.report.units import UNIT_BYTES, ByteUnit, format_bytes, unit_for

_ERROR_LETTERS: Final = 85  # per line of an error's text
_ERROR_LINES: Final = 6
_LETTER_INCHES: Final = 0.09  # of a phase's name, with some room

_Points = tuple[
    NDArray[np.float64], NDArray[np.float64]
]  # instants in seconds, bytes; each of shape (readings,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """What the panels below each other show.

    Args:
        part: The load, or the training step that was sampled apart.
        what: Name of the memory, for people.
        figure: Name of the memory in the timelines.
        has_shard: Whether the size of the largest shard is drawn.
        width_inches: Width of a panel.
    """

    part: Literal["load", "step"]
    what: str
    figure: Figure
    has_shard: bool
    width_inches: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Ends of the axes, the same in all panels of a column."""

    seconds: float
    top_bytes: float
    unit: ByteUnit


def scale_of(runs: Sequence[Run], column: Column) -> Scale:
    """Return the scale on which all of `runs` fit."""
    seconds, top = 0.1, 1.0 * UNIT_BYTES["MiB"]
    for run in runs:
        if column.has_shard:
            top = max(top, run.shard_bytes)
        ranks = [points for _, points in _rank_lines(run, column)]
        for when, values in (_node_line(run, column), *ranks):
            seconds = max(seconds, float(when.max(initial=0.0)))
            top = max(top, float(values.max(initial=0.0)))
    return Scale(seconds=seconds, top_bytes=top, unit=unit_for(top))


def draw_panel(axis: Any, *, run: Run, column: Column, scale: Scale) -> None:
    """Draw one mode.

    Args:
        axis: The matplotlib axes.
        run: The mode.
        column: What of it.
        scale: Ends of the axes.
    """
    _draw_frame(axis, column=column, scale=scale)
    if column.part == "load":
        axis.set_title(run.mode, loc="left", fontsize=11, fontweight="bold")
        if run.error is not None:
            _draw_error(axis, run.error)
            return
    timelines = _timelines(run, column)
    if column.part == "step" and not timelines:
        _draw_words(axis, "no step measured", colour="#666666")
        return
    _draw_phases(axis, timelines=timelines, scale=scale)
    _draw_lines(axis, run=run, column=column, scale=scale)
    if column.has_shard and run.shard_bytes > 0:
        _draw_shard(axis, run.shard_bytes, unit=scale.unit)
    if column.part == "load":
        _draw_peak(axis, run=run, column=column, scale=scale)


def _timelines(run: Run, column: Column) -> tuple[Timeline, ...]:
    return run.timelines if column.part == "load" else run.step_timelines


def _rank_lines(run: Run, column: Column) -> list[tuple[int, _Points]]:
    timelines = _timelines(run, column)
    origin = min((line.started_at_seconds for line in timelines), default=0.0)
    lines = []
    for line in timelines:
        values = line.increases[column.figure]
        was_read = ~np.isnan(values)
        when = line.seconds[was_read] + (line.started_at_seconds - origin)
        lines.append((line.rank, (when, values[was_read])))
    return lines


def _node_line(run: Run, column: Column) -> _Points:
    node = run.node_timelines if column.part == "load" else run.node_step_timelines
    if not node:
        return np.empty(0), np.empty(0)
    origin = min(line.started_at_seconds for line in _timelines(run, column))
    when, total = node_increase(node, column.figure)
    when = when + (min(line.started_at_seconds for line in node) - origin)
    if column.part == "load":
        return when, total
    # A rank counts as 0 before its first reading, which only at the start of the load is what it has.
    all_read_seconds = max(
        line.started_at_seconds - origin + line.seconds[:1].max(initial=0.0) for line in node
    )
    return when[when >= all_read_seconds], total[when >= all_read_seconds]


def _draw_frame(axis: Any, *, column: Column, scale: Scale) -> None:
    unit_bytes = UNIT_BYTES[scale.unit]
    axis.set_xlim(0, scale.seconds * 1.01)
    axis.set_ylim(-0.03 * scale.top_bytes / unit_bytes, 1.18 * scale.top_bytes / unit_bytes)
    axis.set_ylabel(f"{column.what} added\n({scale.unit})", fontsize=9)
    axis.tick_params(labelsize=9)
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.grid(axis="y", color="#BBBBBB", linewidth=0.5)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _draw_phases(axis: Any, *, timelines: Sequence[Timeline], scale: Scale) -> None:
    width_inches = axis.get_position().width * axis.get_figure().get_figwidth()
    for start, span in shaded_phases(timelines):
        colour = phase_colour(span.name)
        width = span.stop_seconds - span.start_seconds
        # A thin edge keeps a phase of a few milliseconds visible.
        axis.axvspan(start, start + width, facecolor=colour, edgecolor=colour, linewidth=0.8, zorder=0)
        if width / scale.seconds * width_inches > len(span.name) * _LETTER_INCHES:
            axis.text(
                start + width / 2,
                0.975,
                span.name,
                transform=axis.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=8.5,
                color="#333333",
            )


def _draw_lines(axis: Any, *, run: Run, column: Column, scale: Scale) -> None:
    unit_bytes = UNIT_BYTES[scale.unit]
    when, total = _node_line(run, column)
    axis.plot(when, total / unit_bytes, color=NODE_COLOUR, linewidth=1.0, linestyle=NODE_DASHES, zorder=2)
    # Rank 0 last: in several modes it alone holds the checkpoint, and it must not be hidden.
    for rank, (instants, values) in reversed(_rank_lines(run, column)):
        axis.plot(
            instants,
            values / unit_bytes,
            color=rank_colour(rank, run.world_size),
            linewidth=rank_width(rank, run.world_size),
            solid_capstyle="butt",
            zorder=4 if rank == 0 else 3,
        )


def _draw_shard(axis: Any, shard_bytes: int, *, unit: ByteUnit) -> None:
    height = shard_bytes / UNIT_BYTES[unit]
    axis.axhline(height, color=SHARD_COLOUR, linewidth=SHARD_WIDTH, zorder=5)
    # Beside the panel, where no line can cross it.
    axis.annotate(
        f"shard\n{format_bytes(shard_bytes, unit=None)}",
        (1.0, height),
        xycoords=axis.get_yaxis_transform(),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=SHARD_COLOUR,
        annotation_clip=False,
    )


def _draw_peak(axis: Any, *, run: Run, column: Column, scale: Scale) -> None:
    """Mark the highest value of any rank, and say it in the title."""
    highest: tuple[float, int, float] | None = None  # bytes, rank, instant
    for rank, (when, values) in _rank_lines(run, column):
        if values.size and (highest is None or values.max() > highest[0]):
            highest = (float(values.max()), rank, float(when[values.argmax()]))
    if highest is None:
        return
    drawn_bytes, rank, seconds = highest
    # In words the figures of the table, which peaks between two samples cannot escape.
    peak_bytes, node_bytes = (
        run.device_peak_bytes,
        node_peak_bytes(run.node_timelines, column.figure, until=LOAD_PHASES),
    )
    if column.figure == "anon_bytes":
        peak_bytes, node_bytes = run.worst_rank.anon_bytes or 0, run.node.anon_bytes
    axis.plot(
        [seconds],
        [drawn_bytes / UNIT_BYTES[scale.unit]],
        marker="o",
        markersize=6,
        markerfacecolor="white",
        markeredgecolor=rank_colour(rank, run.world_size),
        markeredgewidth=1.6,
        zorder=6,
    )
    against = f" = {peak_bytes / run.shard_bytes:.2f}x shard" if column.has_shard and run.shard_bytes else ""
    axis.set_title(
        f"Peak: worst rank (rank {rank}) {format_bytes(peak_bytes, unit=None)}{against}, "
        f"{together_label(run)} {format_bytes(node_bytes or 0, unit=None)}",
        loc="right",
        fontsize=9.5,
    )


def _draw_error(axis: Any, error: str) -> None:
    lines = [part for line in error.splitlines() for part in textwrap.wrap(line, _ERROR_LETTERS)]
    if len(lines) > _ERROR_LINES:
        lines = [*lines[:_ERROR_LINES], "…"]
    _draw_words(axis, "This mode failed:\n" + "\n".join(lines), colour="#8B1A1A")


def _draw_words(axis: Any, words: str, *, colour: str) -> None:
    axis.grid(visible=False)
    axis.text(
        0.5,
        0.5,
        words,
        transform=axis.transAxes,
        ha="center",
        va="center",
        fontsize=9,
        color=colour,
        parse_math=False,
    )
