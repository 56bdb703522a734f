"""The parts of the page that are words and tables."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from shardwise.profiling import Figure, LoadReport, RankReport
from shardwise.report.documents import Shown
from shardwise.report.page.markup import Markup, element, join
from shardwise.report.page.table import table
from shardwise.report.table import memory_columns, notes_of, time_columns, unit_of
from shardwise.report.units import format_bytes, format_seconds
from shardwise.report.words import agreement_lines, fine_tuning_lines

_FIGURE_NAMES: Final = {
    "storage_bytes": "read from storage, job",
    "network_bytes": "moved between ranks, job",
    "whole_tensor_bytes": "whole tensors of conversions, worst rank",
    "host_anon_peak_bytes": "host peak, worst rank",
    "device_peak_bytes": "device peak, worst rank",
    "seconds": "seconds",
}
_DTYPE_WORDS: Final = {
    "stored": "stored: what shards hold",
    "compute": "compute: what the model runs in",
    "reduce": "reduce: what gradients are summed in",
    "optimizer": "optimizer: its state",
}


def summary(shown: Shown) -> Markup:
    """Say what was measured and what came out."""
    good = [run for run in shown.runs if run.error is None]
    lines = []
    by_node = [(run.node.anon_bytes, run.mode) for run in good if run.node.anon_bytes is not None]
    if len(by_node) > 1:
        (least, where), (most, other) = min(by_node), max(by_node)
        lines.append(
            f"Anonymous host memory of all ranks of a node: from {format_bytes(least or 0, unit=None)} ({where}) to "
            f"{format_bytes(most or 0, unit=None)} ({other})."
        )
    times = [(run.report.seconds, run.mode) for run in good if run.report is not None]
    if len(times) > 1:
        lines.append(
            f"Seconds to load and shard: from {format_seconds(min(times)[0])} ({min(times)[1]}) to "
            f"{format_seconds(max(times)[0])} ({max(times)[1]})."
        )
    if shown.comparison is not None and "agreement" in shown.comparison:
        lines += agreement_lines(shown.comparison)
        lines += fine_tuning_lines(shown.comparison.get("fine_tuning"))
    errors = [
        element("p", element("strong", f"{run.mode} failed. "), run.error, class_="error")
        for run in shown.runs
        if run.error is not None
    ]
    return join((_facts(_summary_facts(shown)), *(element("p", line) for line in lines), *errors))


def modes(shown: Shown) -> Markup:
    """Make the table of the modes, with the notes that say what its figures are."""
    unit = unit_of(shown.runs)
    columns = (*time_columns(shown.runs), *memory_columns(unit))
    headers = [column.header.replace("_\n", "_").replace("\n", " ") for column in columns]
    rows = [
        [
            run.mode,
            *(column.cell(run) if run.error is None else None for column in columns),
            "ok" if run.error is None else "failed",
        ]
        for run in shown.runs
    ]
    notes = [note for note in notes_of(shown.runs) if " failed: " not in note]
    return join(
        (
            table(
                f"Times in seconds, memory in {unit}",
                ["mode", *headers, "status"],
                rows,
                number_columns=frozenset(range(1, len(headers) + 1)),
            ),
            element("ul", *(element("li", note) for note in notes), class_="notes"),
        )
    )


def predicted(reports: Sequence[tuple[str, LoadReport]]) -> Markup:
    """Lay what the plan had said beside what was measured."""
    rows = []
    for mode, report in reports:
        for name, said in report.predicted.items():
            measured = _measured(report, name)
            is_bytes = name.endswith("_bytes")
            rows.append(
                [
                    mode,
                    _FIGURE_NAMES.get(name, name),
                    _figure(said, is_bytes=is_bytes),
                    "not measured apart" if measured is None else _figure(measured, is_bytes=is_bytes),
                    None if measured is None else _difference(said, measured, is_bytes=is_bytes),
                ]
            )
    if not rows:
        return element("p", "Nothing was predicted: there was no plan.")
    return table(
        "What the plan said before the first byte was read, and what it was",
        ["mode", "figure", "predicted", "measured", "difference"],
        rows,
        number_columns=frozenset((2, 3, 4)),
        class_="long",
    )


def ranks(shown: Shown, reports: Sequence[tuple[str, LoadReport]]) -> Markup:
    """List every rank of every mode."""
    parts = []
    lines_of = {run.mode: {line.rank: line for line in run.timelines} for run in shown.runs}
    columns: dict[str, Callable[[RankReport], str]] = {
        "node": lambda rank: rank.node,
        "shard": lambda rank: format_bytes(rank.shard_bytes, unit=None),
        "host peak": lambda rank: format_bytes(rank.host_anon_peak_bytes, unit=None),
        "device peak": lambda rank: format_bytes(rank.device_peak_bytes, unit=None),
        "from storage": lambda rank: format_bytes(rank.storage_bytes, unit=None),
        "from ranks": lambda rank: format_bytes(rank.network_bytes, unit=None),
        "seconds": lambda rank: format_seconds(rank.seconds),
    }
    counters: dict[str, Figure] = {
        "fetched": "fetched_bytes",
        "read calls": "read_bytes",
        "machine received": "received_bytes",
    }
    for mode, report in reports:
        lines = lines_of.get(mode, {})
        counted = {
            name: {
                rank: peak
                for rank, line in lines.items()
                if (peak := line.peak_bytes(figure, until_seconds=float("inf"))) is not None
            }
            for name, figure in counters.items()
        }
        counted = {name: peaks for name, peaks in counted.items() if peaks}
        rows = [
            [
                f"rank {rank.rank}",
                *(cell(rank) for cell in columns.values()),
                *(
                    format_bytes(peaks[rank.rank], unit=None) if rank.rank in peaks else None
                    for peaks in counted.values()
                ),
            ]
            for rank in report.ranks
        ]
        headers = ["rank", *columns, *counted]
        parts.append(
            element(
                "details",
                element("summary", f"{mode}, route {report.route}"),
                element("p", f"Route {report.route}: {report.route_reason}.", class_="notes"),
                table(f"Ranks of {mode}", headers, rows, number_columns=frozenset(range(2, len(headers)))),
            )
        )
    notes = element(
        "p",
        "From storage and from ranks: what shardwise asked for. Fetched: what the kernel fetched from storage for the process; what the "
        "page cache held is not in it. Read calls: what they returned, of files, pipes and sockets. Machine received: by all network "
        "interfaces, for all processes.",
        class_="notes",
    )
    return join((*parts, notes))


def dtypes(reports: Sequence[tuple[str, LoadReport]]) -> Markup:
    """List the dtypes of every mode."""
    rows = [[mode, *(report.dtypes[role] for role in _DTYPE_WORDS)] for mode, report in reports]
    return join(
        (
            table("Dtypes by mode", ["mode", *_DTYPE_WORDS], rows, number_columns=frozenset()),
            element("ul", *(element("li", words) for words in _DTYPE_WORDS.values()), class_="notes"),
        )
    )


def environment(comparison: Mapping[str, Any]) -> Markup:
    """List versions and the machine."""
    found: Mapping[str, Any] = comparison.get("environment") or {}
    facts = {name: value or "not installed" for name, value in found.get("versions", {}).items()}
    facts |= {name.replace("_", " "): str(value) for name, value in found.items() if name != "versions"}
    return _facts(facts) if facts else element("p", "Not recorded.")


def _summary_facts(shown: Shown) -> dict[str, str]:
    facts = {}
    report = next((run.report for run in shown.runs if run.report is not None), None)
    if shown.comparison is not None:
        facts["model"] = str(shown.comparison.get("model", ""))
        facts["dtype asked for"] = str(shown.comparison.get("dtype", "auto"))
    elif report is not None:
        facts["model"] = report.model
    lines = [line for run in shown.runs for line in run.timelines]
    if lines:
        began = min(line.started_at_seconds for line in lines)
        facts["began"] = datetime.datetime.fromtimestamp(began, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    ranks = max(run.world_size for run in shown.runs)
    if ranks:
        nodes = max(len(run.nodes) for run in shown.runs)
        facts["ranks"] = f"{ranks} on {nodes} node{'' if nodes == 1 else 's'}" if nodes else str(ranks)
    shard_bytes = max(run.shard_bytes for run in shown.runs)
    if shard_bytes:
        facts["largest shard"] = format_bytes(shard_bytes, unit=None)
    return {name: value for name, value in facts.items() if value}


def _facts(facts: Mapping[str, str]) -> Markup:
    pairs = (element("div", element("dt", name), element("dd", value)) for name, value in facts.items())
    return element("dl", *pairs, class_="facts")


def _measured(report: LoadReport, name: str) -> float | None:
    if name in ("storage_bytes", "network_bytes", "seconds"):
        return float(getattr(report, name))
    of_ranks = [getattr(rank, name, None) for rank in report.ranks]
    return max((float(value) for value in of_ranks if value is not None), default=None)


def _figure(value: float, *, is_bytes: bool) -> str:
    return format_bytes(value, unit=None) if is_bytes else format_seconds(value)


def _difference(said: float, measured: float, *, is_bytes: bool) -> str:
    if said == measured:
        return "equal"
    sign = "+" if measured > said else "-"
    words = f"{sign}{_figure(abs(measured - said), is_bytes=is_bytes)}"
    return f"{words} ({100 * (measured / said - 1):+.1f} %)" if said else words
