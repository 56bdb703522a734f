"""Where each tensor came from: counts by origin, and a list that can be searched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shardwise.profiling import LoadReport
from shardwise.profiling.load_report import ORIGINS
from shardwise.report.page.markup import Markup, element, join
from shardwise.report.page.table import table

MOST_NAMES: Final = 4000  # rows that a phone still scrolls through


def tensors(reports: Sequence[tuple[str, LoadReport]]) -> Markup:
    """Make both; modes that end with the same origins share a list.

    Args:
        reports: By mode.
    """
    shown = [origin for origin in ORIGINS if any(report.tensors.get(origin) for _, report in reports)]
    counts = table(
        "Tensors by origin",
        ["mode", *shown, "converted whole"],
        [
            [mode, *(str(report.tensors.get(origin, 0)) for origin in shown), str(len(report.converted))]
            for mode, report in reports
        ],
        number_columns=frozenset(range(1, len(shown) + 2)),
    )
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for mode, report in reports:
        converted = frozenset(report.converted)
        listed = tuple(
            (name, f"{origin}, converted whole" if name in converted else origin)
            for name, origin in report.origins.items()
        )
        if listed:
            groups.setdefault(listed, []).append(mode)
    lists = [_list(", ".join(names), listed, index) for index, (listed, names) in enumerate(groups.items())]
    return join((counts, *lists))


def _list(modes: str, listed: tuple[tuple[str, str], ...], index: int) -> Markup:
    rows = [list(each) for each in listed[:MOST_NAMES]]
    more = len(listed) - len(rows)
    words = f"{len(listed):,} tensors" if not more else f"The first {len(rows):,} of {len(listed):,} tensors"
    search = f"search-{index}"
    return element(
        "details",
        element("summary", f"Every tensor and its origin: {modes}"),
        element(
            "p",
            element("label", "Names or origins with ", for_=search),
            element("input", type="search", id=search, autocomplete="off", spellcheck="false"),
            class_="needs-script",
        ),
        element("p", f"{words}.", class_="count", role="status"),
        table(
            f"Origin of each tensor: {modes}",
            ["tensor", "origin"],
            rows,
            number_columns=frozenset(),
            class_="names",
        ),
        element("p", "The others are in the report's JSON document.") if more else None,
        class_="tensors",
    )
