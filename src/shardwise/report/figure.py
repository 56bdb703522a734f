"""The comparison as a picture: memory over time, one panel per mode."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import MissingDependencyError
from shardwise.profiling import Figure, node_increase, node_peak_bytes
from shardwise.report.comparison import LOAD_PHASES, Run, load_end_seconds, read_comparison
from shardwise.report.legend import (
    NODE_COLOUR,
    NODE_DASHES,
    draw_words,
    phase_colour,
    rank_colour,
    rank_width,
    shaded_phases,
    together_label,
)
from shardwise.report.units import UNIT_BYTES, ByteUnit, format_bytes, unit_for

_DPI: Final = 150
_PANEL_INCHES: Final = 2.15
_ABOVE_INCHES: Final = 1.5  # title and two rows of legend
_BELOW_INCHES: Final = 1.3  # axis label and footnote
_COLUMN_INCHES: Final = 10.5
_ERROR_LETTERS: Final = 95  # per line of an error's text
_ERROR_LINES: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """Ends of the axes, the same in all panels."""

    seconds: float
    top_bytes: float
    unit: ByteUnit


def save_figure(comparison: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw a comparison: memory over time, one panel per mode, all on the same scales.

    Lines are the ranks' anonymous host memory above the start, the dashed line is their sum on the fullest node,
    and rank 0's phases are shaded. Device memory is a second column where any rank used some. A mode that failed
    has a panel with its error.

    Args:
        comparison: A document of schema `shardwise.compare/1`.
        path: File to write; its suffix chooses the format (`.png`, `.svg`, `.pdf`). Missing directories are made.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ConfigurationError: The document cannot be read.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise MissingDependencyError(
            "picture of a comparison: expected matplotlib, and it is not installed. "
            "Run `pip install 'shardwise[report]'`."
        ) from error
    runs = read_comparison(comparison)
    columns: list[tuple[str, Figure]] = [("Host memory", "anon_bytes")]
    if any(run.device_peak_bytes > 0 for run in runs):
        columns.append(("Device memory", "device_bytes"))
    height = _ABOVE_INCHES + _BELOW_INCHES + _PANEL_INCHES * len(runs)
    figure = Canvas(figsize=(_COLUMN_INCHES * (1.0 if len(columns) == 1 else 1.6), height), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(runs), len(columns), sharex=True, sharey="col", squeeze=False)
    figure.subplots_adjust(
        left=1.0 / figure.get_figwidth(),
        right=1 - 0.25 / figure.get_figwidth(),
        top=1 - _ABOVE_INCHES / height,
        bottom=_BELOW_INCHES / height,
        hspace=0.32,
        wspace=0.14,
    )
    for column, (what, name) in enumerate(columns):
        scale = _scale(runs, name)
        for row, run in enumerate(runs):
            axis = axes[row][column]
            _draw_frame(axis, run=run, what=what, scale=scale)
            if run.error is None:
                _draw_phases(axis, run=run, scale=scale)
                _draw_lines(axis, run=run, name=name, scale=scale)
            else:
                _draw_error(axis, run.error)
        axes[-1][column].set_xlabel("Seconds since loading began (after the imports)")
    draw_words(figure, comparison=comparison, runs=runs, first=axes[0][0])
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=_DPI)


def _scale(runs: Sequence[Run], name: Figure) -> _Scale:
    seconds, top = 0.0, 0.0
    for run in runs:
        instants, total = _node_line(run, name)
        seconds = max(seconds, float(instants.max(initial=0.0)))
        top = max(top, float(total.max(initial=0.0)))
        for _, when, values in _rank_lines(run, name):
            seconds = max(seconds, float(when.max(initial=0.0)))
            top = max(top, float(values.max(initial=0.0)))
    top = max(top, 1.0 * UNIT_BYTES["MiB"])
    return _Scale(seconds=max(seconds, 0.1), top_bytes=top, unit=unit_for(top))


def _rank_lines(run: Run, name: Figure) -> list[tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
    origin = min((line.started_at_seconds for line in run.timelines), default=0.0)
    lines = []
    for line in run.timelines:
        was_read = ~np.isnan(line.increases[name])
        when = line.seconds[was_read] + (line.started_at_seconds - origin)
        lines.append((line.rank, when, line.increases[name][was_read]))
    return lines


def _node_line(run: Run, name: Figure) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return node_increase(run.node_timelines, name)


def _draw_frame(axis: Any, *, run: Run, what: str, scale: _Scale) -> None:
    unit_bytes = UNIT_BYTES[scale.unit]
    axis.set_xlim(0, scale.seconds * 1.01)
    axis.set_ylim(-0.03 * scale.top_bytes / unit_bytes, 1.18 * scale.top_bytes / unit_bytes)
    axis.set_title(run.mode, loc="left", fontsize=11, fontweight="bold")
    axis.set_ylabel(f"{what} added\n({scale.unit})", fontsize=9)
    axis.tick_params(labelsize=9)
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.grid(axis="y", color="#BBBBBB", linewidth=0.5)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _draw_phases(axis: Any, *, run: Run, scale: _Scale) -> None:
    for start, span in shaded_phases(run):
        colour = phase_colour(span.name)
        width = span.stop_seconds - span.start_seconds
        # A thin edge keeps a phase of a few milliseconds visible.
        axis.axvspan(start, start + width, facecolor=colour, edgecolor=colour, linewidth=0.8, zorder=0)
        letters = len(span.name) * scale.seconds * 0.0105
        if width > letters:
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


def _draw_lines(axis: Any, *, run: Run, name: Figure, scale: _Scale) -> None:
    unit_bytes = UNIT_BYTES[scale.unit]
    when, total = _node_line(run, name)
    axis.plot(
        *_broken(when, total / unit_bytes, run.break_seconds),
        color=NODE_COLOUR,
        linewidth=1.0,
        linestyle=NODE_DASHES,
        zorder=2,
    )
    # Rank 0 last: in several modes it alone holds the checkpoint, and it must not be hidden.
    for rank, instants, values in reversed(_rank_lines(run, name)):
        axis.plot(
            *_broken(instants, values / unit_bytes, run.break_seconds),
            color=rank_colour(rank, run.world_size),
            linewidth=rank_width(rank, run.world_size),
            solid_capstyle="butt",
            zorder=4 if rank == 0 else 3,
        )
    worst = _worst_point(run, name)
    if worst is None:
        return
    rank, seconds, drawn_bytes = worst
    # In words the figures of the table, which peaks between two samples cannot escape.
    peak_bytes, node_bytes = (
        run.device_peak_bytes,
        node_peak_bytes(run.node_timelines, name, until=LOAD_PHASES),
    )
    if name == "anon_bytes":
        peak_bytes, node_bytes = run.worst_rank.anon_bytes or 0, run.node.anon_bytes
    axis.plot(
        [seconds],
        [drawn_bytes / unit_bytes],
        marker="o",
        markersize=6,
        markerfacecolor="white",
        markeredgecolor=rank_colour(rank, run.world_size),
        markeredgewidth=1.6,
        zorder=6,
    )
    axis.set_title(
        f"Peak while loading: worst rank (rank {rank}) {format_bytes(peak_bytes, unit=None)}, "
        f"{together_label(run)} {format_bytes(node_bytes or 0, unit=None)}",
        loc="right",
        fontsize=9.5,
    )


def _broken(
    when: NDArray[np.float64], values: NDArray[np.float64], break_seconds: float | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a line with a hole where nothing was measured."""
    if break_seconds is None:
        return when, values
    index = int(np.searchsorted(when, break_seconds))
    return np.insert(when, index, break_seconds), np.insert(values, index, np.nan)


def _worst_point(run: Run, name: Figure) -> tuple[int, float, float] | None:
    """Return rank, instant on the panel's axis and bytes of the highest value of any rank while loading."""
    worst: tuple[int, float, float] | None = None
    origin = min((line.started_at_seconds for line in run.timelines), default=0.0)
    for line, (rank, when, values) in zip(run.timelines, _rank_lines(run, name), strict=True):
        end = load_end_seconds(line, timelines=run.timelines, break_seconds=run.break_seconds)
        inside = values[when <= end + line.started_at_seconds - origin]
        if inside.size and (worst is None or inside.max() > worst[2]):
            worst = (rank, float(when[inside.argmax()]), float(inside.max()))
    return worst


def _draw_error(axis: Any, error: str) -> None:
    lines = [part for line in error.splitlines() for part in textwrap.wrap(line, _ERROR_LETTERS)]
    if len(lines) > _ERROR_LINES:
        lines = [*lines[:_ERROR_LINES], "…"]
    axis.grid(visible=False)
    axis.text(
        0.5,
        0.5,
        "This mode failed:\n" + "\n".join(lines),
        transform=axis.transAxes,
        ha="center",
        va="center",
        fontsize=9,
        color="#8B1A1A",
        parse_math=False,
    )
