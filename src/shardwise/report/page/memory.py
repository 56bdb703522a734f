"""Memory over time, one chart per mode, and which memory it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shardwise.profiling import Figure
from shardwise.report.comparison import Run
from shardwise.report.page.chart import FIGURE_WORDS, INSIDE, legend, panel, scale
from shardwise.report.page.markup import Markup, element, join
from shardwise.report.page.series import Series, length_seconds, series_of
from shardwise.report.page.table import table
from shardwise.report.units import UNIT_BYTES

_BUTTONS: Final[dict[Figure, str]] = {
    "anon_bytes": "Anonymous",
    "file_bytes": "File-backed",
    "shared_bytes": "Shared",
    "pss_bytes": "PSS",
    "device_bytes": "Device",
    "device_reserved_bytes": "Device reserved",
}
_WORTH_A_CHART_BYTES: Final = UNIT_BYTES["MiB"]  # figures that nobody used are not offered


def memory(runs: Sequence[Run]) -> Markup:
    """Make the charts of all modes on shared scales, with a choice of the figure.

    Args:
        runs: The modes.
    """
    measured = [run for run in runs if run.timelines]
    end_seconds = max((length_seconds(run.timelines) for run in measured), default=0.0)
    if end_seconds <= 0.0:
        return element("p", "No memory was recorded over time.")
    charts = _charts(measured, end_seconds)
    choice = element(
        "fieldset",
        element("legend", "Which memory"),
        *(
            element(
                "label",
                element("input", type="radio", name="figure", value=figure, checked=index == 0),
                f" {_BUTTONS[figure]}",
                title=FIGURE_WORDS[figure],
            )
            for index, figure in enumerate(charts)
        ),
        class_="choice needs-script",
    )
    scales = {figure: scale(list(series.values())) for figure, series in charts.items()}
    figures = [_mode(run, charts, scales) for run in measured]
    return join((choice, element("div", *figures, class_="charts", data_shown=next(iter(charts)))))


def _charts(runs: Sequence[Run], end_seconds: float) -> dict[Figure, dict[str, Series]]:
    charts: dict[Figure, dict[str, Series]] = {}
    for figure in _BUTTONS:
        found = {
            run.mode: series
            for run in runs
            if (
                series := series_of(
                    run.timelines, node=run.node_timelines, figure=figure, end_seconds=end_seconds
                )
            )
        }
        highest = max(
            ((line.peak_bytes or 0.0) for series in found.values() for line in series.lines), default=0.0
        )
        if figure == "anon_bytes" or highest >= _WORTH_A_CHART_BYTES:
            charts[figure] = found
    return charts


def _mode(
    run: Run, charts: dict[Figure, dict[str, Series]], scales: dict[Figure, tuple[float, float]]
) -> Markup:
    panels = []
    first: Series | None = None
    for figure, series in charts.items():
        of_run = series.get(run.mode)
        if of_run is None:
            panels.append(
                element("p", f"{_BUTTONS[figure]}: not measured.", class_="panel", data_figure=figure)
            )
            continue
        first = first or of_run
        low_bytes, top_bytes = scales[figure]
        has_shard = figure == "anon_bytes" and run.shard_bytes > 0
        panels.append(
            panel(
                of_run,
                what=run.mode,
                shard_bytes=run.shard_bytes if has_shard else 0,
                low_bytes=low_bytes,
                top_bytes=max(top_bytes, run.shard_bytes * 1.05) if has_shard else top_bytes,
            )
        )
    return element(
        "figure",
        element("figcaption", element("h3", run.mode)),
        *panels,
        legend(first, shard_bytes=run.shard_bytes) if first is not None else None,
        _phases(run.mode, first) if first is not None else None,
        _step(run),
    )


def _phases(mode: str, series: Series) -> Markup | None:
    if not series.phases:
        return None
    rows = [
        [
            f"{INSIDE.lstrip() * band.depth}{band.name}",
            f"{band.start_seconds:.3f}",
            f"{band.stop_seconds - band.start_seconds:.3f}",
        ]
        for band in series.phases
    ]
    return element(
        "details",
        element("summary", f"Phases of the first rank of {mode}"),
        table(
            f"{mode}, in seconds;{INSIDE}stands before a phase inside another",
            ["phase", "start", "length"],
            rows,
            number_columns=frozenset((1, 2)),
            class_="narrow",
        ),
    )


def _step(run: Run) -> Markup | None:
    length = length_seconds(run.step_timelines)
    if length <= 0.0:
        return None
    series = series_of(
        run.step_timelines, node=run.node_step_timelines, figure="anon_bytes", end_seconds=length
    )
    if series is None:
        return None
    low_bytes, top_bytes = scale([series])
    return element(
        "details",
        element("summary", f"One training step of {run.mode}, sampled apart"),
        element(
            "p",
            "It ran after the comparison, which gathers every tensor and runs the model: its start holds what that left in memory. "
            "Its scales are its own.",
            class_="notes",
        ),
        panel(
            series,
            what=f"a training step of {run.mode}",
            shard_bytes=0,
            low_bytes=low_bytes,
            top_bytes=top_bytes,
        ),
        class_="step",
    )
