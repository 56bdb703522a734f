"""One chart of the page: lines in inline SVG, its words in HTML, so that they keep their size on any screen."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from shardwise.profiling import Figure
from shardwise.report.page.markup import Markup, data_script, element, join
from shardwise.report.page.series import Band, Line, Series
from shardwise.report.units import UNIT_BYTES, format_bytes, format_seconds, unit_for

FIGURE_WORDS: Final[dict[Figure, str]] = {
    "anon_bytes": "anonymous host memory",
    "file_bytes": "file-backed host memory",
    "shared_bytes": "shared host memory",
    "pss_bytes": "proportional set size",
    "device_bytes": "device memory in live tensors",
    "device_reserved_bytes": "device memory reserved",
}
INSIDE: Final = " \u203a "  # between a phase and the one in it
_KNOWN_PHASES: Final = ("from_pretrained", "optimizer", "wrap_model", "step")
_OTHER_PHASES: Final = 4  # colours that the others take in turn
_WIDTH: Final = 1000  # of the drawing, stretched to what the screen has
_HEIGHT: Final = 300
_TICKS: Final = 4
_DATA_UNIT_BYTES: Final = UNIT_BYTES["MiB"] / 10


def scale(series: list[Series]) -> tuple[float, float]:
    """Return the lowest and the highest value that the axis must reach, in bytes."""
    values = [line.values[~np.isnan(line.values)] for each in series for line in each.lines]
    lowest = min((float(column.min(initial=0.0)) for column in values), default=0.0)
    highest = max((float(column.max(initial=0.0)) for column in values), default=0.0)
    return min(0.0, lowest), max(highest, 1.0 * UNIT_BYTES["MiB"]) * 1.05


def panel(series: Series, *, what: str, shard_bytes: int, low_bytes: float, top_bytes: float) -> Markup:
    """Make the chart with its axes, a slider that reads it out, and the values at the peak.

    Args:
        series: What is drawn.
        what: The mode, for names that only a screen reader says.
        shard_bytes: Largest shard, drawn as a line of its own; 0 for none.
        low_bytes: Lower end of the axis.
        top_bytes: Upper end of the axis.
    """
    end = float(series.instants[-1])
    summary = _summary(series)
    unit = unit_for(top_bytes)
    at = _peak_index(series)
    title = (
        f"{FIGURE_WORDS[series.figure].capitalize()} of {what} over {format_seconds(end)} seconds. {summary}"
    )

    def height(count_bytes: float) -> float:
        return (count_bytes - low_bytes) / (top_bytes - low_bytes)

    y_axis = [
        element("span", f"{tick:g}", style=f"bottom:{100 * height(tick * UNIT_BYTES[unit]):.2f}%")
        for tick in ticks(low_bytes / UNIT_BYTES[unit], top_bytes / UNIT_BYTES[unit])
    ]
    x_axis = [element("span", f"{tick:g}", style=f"left:{100 * tick / end:.2f}%") for tick in ticks(0.0, end)]
    drawing = element(
        "svg",
        *(_shade(band, end) for band in series.shaded),
        *(
            element("line", class_="grid", x1=0, x2=_WIDTH, y1=y, y2=y)
            for y in (
                round(_HEIGHT * (1 - height(tick * UNIT_BYTES[unit])), 1)
                for tick in ticks(low_bytes / UNIT_BYTES[unit], top_bytes / UNIT_BYTES[unit])
            )
        ),
        _shard_line(shard_bytes, y=_HEIGHT * (1 - height(shard_bytes))),
        # Rank 0 last: in several modes it alone holds the checkpoint, and it must not be hidden.
        *(_polyline(line, low_bytes=low_bytes, top_bytes=top_bytes) for line in reversed(series.lines)),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=title,
    )
    return element(
        "div",
        element("p", summary, class_="says"),
        element(
            "div",
            element("p", f"{unit} above the start", class_="axis-name", aria_hidden="true"),
            element("div", *y_axis, class_="y-axis", aria_hidden="true"),
            element("div", drawing, element("div", class_="cursor", hidden=True), class_="plot"),
            element("div", *x_axis, class_="x-axis", aria_hidden="true"),
            element(
                "input",
                type="range",
                class_="needs-script at",
                min=0,
                max=series.instants.size - 1,
                value=at,
                aria_label=f"Instant at which {what}, {FIGURE_WORDS[series.figure]}, is read out",
            ),
            element("p", "seconds", class_="x-name", aria_hidden="true"),
            class_="chart",
        ),
        element("output", _values_at(series, at), class_="values", aria_live="off"),
        data_script(_data(series)),
        class_="panel",
        data_figure=series.figure,
    )


def legend(series: Series, *, shard_bytes: int) -> Markup:
    """Make the list of what else is drawn; the values that are read out name the lines of the ranks."""
    entries = []
    if series.left_out:
        entries.append(element("li", f"({series.left_out} ranks with lower peaks are not drawn)"))
    if shard_bytes:
        entries.append(
            _entry("key line shard", f"shard: what one rank keeps, {format_bytes(shard_bytes, unit=None)}")
        )
    named = {band.name: band for band in series.shaded}
    entries += [_entry(f"key shade {phase_style(name)}", f"phase {name}") for name in named]
    return element("ul", *entries, class_="legend")


def phase_style(name: str) -> str:
    """Return the class that gives a phase its colour."""
    if name in _KNOWN_PHASES:
        return f"phase-{name}"
    return f"phase-other-{sum(name.encode()) % _OTHER_PHASES}"


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers from `low` to `high`, both included where they are round; about four."""
    rough = (high - low) / _TICKS
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough)
    first = math.ceil(low / step)
    return [round(index * step, 10) for index in range(first, math.floor(high / step) + 1)]


def _summary(series: Series) -> str:
    ranks = [line for line in series.lines if line.style != "together" and line.peak_bytes is not None]
    if not ranks:
        return "Not measured."
    highest = max(ranks, key=lambda line: line.peak_bytes or 0.0)
    words = f"Highest: {highest.name}, {format_bytes(highest.peak_bytes or 0, unit=None)} at {format_seconds(highest.peak_seconds)} s"
    for line in series.lines:
        if line.style == "together" and line.peak_bytes is not None:
            words += f"; {line.name}, {format_bytes(line.peak_bytes, unit=None)}"
    return f"{words}."


def _peak_index(series: Series) -> int:
    totals = series.lines[-1].values  # the ranks together, or the only rank
    return 0 if np.isnan(totals).all() else int(np.nanargmax(totals))


def _shade(band: Band, end_seconds: float) -> Markup:
    start, stop = (_WIDTH * seconds / end_seconds for seconds in (band.start_seconds, band.stop_seconds))
    return element(
        "rect",
        class_=f"shade {phase_style(band.name)}",
        x=f"{start:.1f}",
        y=0,
        width=f"{max(stop - start, 1.5):.1f}",  # one of a few milliseconds stays visible
        height=_HEIGHT,
    )


def _shard_line(shard_bytes: int, *, y: float) -> Markup | None:
    if not shard_bytes:
        return None
    return element("line", class_="line shard", x1=0, x2=_WIDTH, y1=f"{y:.1f}", y2=f"{y:.1f}")


def _polyline(line: Line, *, low_bytes: float, top_bytes: float) -> Markup:
    step = _WIDTH / (line.values.size - 1)
    points = [
        f"{index * step:.0f},{_HEIGHT * (top_bytes - value) / (top_bytes - low_bytes):.1f}"
        for index, value in enumerate(line.values.tolist())
        if not math.isnan(value)
    ]
    return element("polyline", class_=f"line {line.style}", points=" ".join(points))


def _entry(style: str, words: str) -> Markup:
    return element("li", element("span", class_=style, aria_hidden="true"), words)


def _values_at(series: Series, at: int) -> Markup:
    seconds = float(series.instants[at])
    inside = [band.name for band in series.phases if band.start_seconds <= seconds <= band.stop_seconds]
    heading = f"{format_seconds(seconds)} s" + (f", {INSIDE.join(inside)}" if inside else "")
    entries = [
        element(
            "li",
            element("span", class_=f"key line {line.style}", aria_hidden="true"),
            f"{line.name} ",
            element("b", _words(line, at)),
        )
        for line in series.lines
    ]
    return join((element("span", heading, class_="when"), element("ul", *entries)))


def _words(line: Line, at: int) -> str:
    value = float(line.values[at])
    return "-" if math.isnan(value) else format_bytes(value, unit=None)


def _data(series: Series) -> dict[str, object]:
    return {
        "end": round(float(series.instants[-1]), 6),
        "lines": [
            {
                "name": line.name,
                "style": line.style,
                "values": [
                    None if math.isnan(value) else round(value / _DATA_UNIT_BYTES)  # tenths of a MiB
                    for value in line.values.tolist()
                ],
            }
            for line in series.lines
        ],
        "phases": [
            [band.name, round(band.start_seconds, 6), round(band.stop_seconds, 6)] for band in series.phases
        ],
    }
