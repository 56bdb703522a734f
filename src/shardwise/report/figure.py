"""The comparison as a picture: memory over time, one row of panels per mode."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from shardwise.errors import ConfigurationError, MissingDependencyError
from shardwise.report.comparison import Run, read_comparison
from shardwise.report.legend import draw_words
from shardwise.report.panel import Column, draw_panel, scale_of

_SUFFIXES: Final = (".png", ".svg", ".pdf")
_DPI: Final = 150
_PANEL_INCHES: Final = 1.95  # height
_BETWEEN_ROWS_INCHES: Final = 0.55
_ABOVE_INCHES: Final = 1.75  # title and three rows of legend
_BELOW_INCHES: Final = 1.75  # axis label and a footnote of up to seven lines
_LEFT_INCHES: Final = 1.0
_RIGHT_INCHES: Final = 0.85  # what stands beside a panel
_BETWEEN_COLUMNS_INCHES: Final = 1.45  # the same, and the axis of the next column
_HOST: Final = Column(part="load", what="Host memory", figure="anon_bytes", has_shard=True, width_inches=8.2)
_DEVICE: Final = Column(
    part="load", what="Device memory", figure="device_bytes", has_shard=False, width_inches=7.1
)
_STEP: Final = Column(part="step", what="Host memory", figure="anon_bytes", has_shard=False, width_inches=2.3)
_STEP_HEADING: Final = "one training step, apart"
_X_LABELS: Final = {
    "load": "Seconds since loading began (after the imports)",
    "step": "Seconds since the step began",
}


def save_figure(comparison: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw a comparison: memory over time, one row of panels per mode, each column on scales of its own.

    Lines are the ranks' anonymous host memory above the start, the dashed line is their sum on the fullest node,
    the thin line is the largest shard, and rank 0's phases are shaded. Device memory is a second column where any
    rank used some, and the training step a narrow last one where it was sampled apart. A mode that failed has a
    panel with its error.

    Args:
        comparison: A document of schema `shardwise.compare/1`.
        path: File to write; its suffix chooses the format (`.png`, `.svg`, `.pdf`). Missing directories are made.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ConfigurationError: The document cannot be read, or the suffix is another one.
    """
    target = Path(path)
    if target.suffix.lower() not in _SUFFIXES:
        raise ConfigurationError(
            f"picture of a comparison: expected a file that ends in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}, got {target}."
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise MissingDependencyError(
            "picture of a comparison: expected matplotlib, and it is not installed. "
            "Run `pip install 'shardwise[report]'`."
        ) from error
    runs = read_comparison(comparison)
    columns = _columns(runs)
    widths = [column.width_inches for column in columns]
    width = _LEFT_INCHES + sum(widths) + _BETWEEN_COLUMNS_INCHES * (len(widths) - 1) + _RIGHT_INCHES
    height = (
        _ABOVE_INCHES + _PANEL_INCHES * len(runs) + _BETWEEN_ROWS_INCHES * (len(runs) - 1) + _BELOW_INCHES
    )
    figure = Canvas(figsize=(width, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(runs), len(columns), sharex="col", sharey="col", squeeze=False, width_ratios=widths
    )
    figure.subplots_adjust(
        left=_LEFT_INCHES / width,
        right=1 - _RIGHT_INCHES / width,
        top=1 - _ABOVE_INCHES / height,
        bottom=_BELOW_INCHES / height,
        hspace=_BETWEEN_ROWS_INCHES / _PANEL_INCHES,
        wspace=_BETWEEN_COLUMNS_INCHES * len(widths) / sum(widths),
    )
    for index, column in enumerate(columns):
        scale = scale_of(runs, column)
        for row, run in enumerate(runs):
            draw_panel(axes[row][index], run=run, column=column, scale=scale)
        axes[-1][index].set_xlabel(_X_LABELS[column.part])
        if column.part == "step":
            axes[0][index].set_title(_STEP_HEADING, loc="left", fontsize=11)
    draw_words(figure, comparison=comparison, runs=runs, first=axes[0][0])
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=_DPI)


def _columns(runs: Sequence[Run]) -> tuple[Column, ...]:
    columns = [_HOST]
    if any(run.device_peak_bytes > 0 for run in runs):
        columns.append(_DEVICE)
    if any(run.step_timelines for run in runs):
        columns.append(_STEP)
    return tuple(columns)
