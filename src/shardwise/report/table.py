"""The comparison as a table on the terminal, and in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardwise.report.comparison import Run, counted_ranks, model_name, read_comparison
from shardwise.report.fitted import FilledColumn, print_fitted, table_of
from shardwise.report.timelines import LOAD_PHASES
from shardwise.report.units import ByteUnit, format_number, format_seconds

PIPED_WIDTH: Final = 120  # columns at least, where there is no terminal to fit
_NONE: Final = "-"
_GIB_FROM: Final = 64 << 30  # below, MiB have at most five digits and show the staging buffers too


@dataclass(frozen=True, slots=True, kw_only=True)
class TableColumn:
    """A header, and how a run's cell is made."""

    header: str
    cell: Callable[[Run], str]


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """Make the table of a comparison: one row per mode.

    Args:
        comparison: A document of schema `shardwise.compare/1`.

    Returns:
        Seconds per phase, host peaks of the worst rank and of the node (anonymous, file-backed and PSS apart),
        device peak, shard, and status.

    Raises:
        ConfigurationError: The document cannot be read.
    """
    names, columns = _columns(read_comparison(comparison))
    return table_of([names, *columns], box=box.SIMPLE_HEAD)


def render(comparison: Mapping[str, Any], console: Console) -> None:
    """Print the table of a comparison, and notes that say what it shows.

    In a terminal that is too narrow, what does not fit comes in further tables. Where there is no terminal, lines are at
    least 120 characters long, whatever width the console was given.

    Args:
        comparison: A document of schema `shardwise.compare/1`.
        console: Where to print.

    Raises:
        ConfigurationError: The document cannot be read.
    """
    runs = read_comparison(comparison)
    names, columns = _columns(runs)
    width_before = console.width
    try:
        if not console.is_terminal:
            console.width = max(PIPED_WIDTH, width_before)
        console.print(Text(_headline(comparison, runs)))
        print_fitted(console, names, [columns], box=box.SIMPLE_HEAD)
        for note in notes_of(runs):
            console.print(Text(note))
    finally:
        console.width = width_before


def _columns(runs: Sequence[Run]) -> tuple[FilledColumn, list[FilledColumn]]:
    """Return the modes' names, and the columns beside them."""

    def filled(column: TableColumn) -> FilledColumn:
        cells = [column.cell(run) if run.error is None else _NONE for run in runs]
        return FilledColumn(header=column.header, cells=cells, justify="right")

    statuses = ["ok" if run.error is None else "failed" for run in runs]
    return (
        FilledColumn(header="mode", cells=[run.mode for run in runs], justify="left"),
        [
            *map(filled, (*time_columns(runs), *memory_columns(unit_of(runs)))),
            FilledColumn(header="status", cells=statuses, justify="left"),
        ],
    )


def time_columns(runs: Sequence[Run]) -> tuple[TableColumn, ...]:
    """Return the columns of times in seconds."""
    names = dict.fromkeys([*LOAD_PHASES, *(name for run in runs for name in run.phase_seconds)])
    phases = (_phase_column(name) for name in names if any(name in run.phase_seconds for run in runs))
    step = TableColumn(
        header="step",
        cell=lambda run: _NONE if run.step_seconds is None else format_seconds(run.step_seconds),
    )
    repeated = any(run.repeat_seconds for run in runs)
    return (*phases, *((TableColumn(header="load\n(min-max)", cell=_spread),) if repeated else ()), step)


def _spread(run: Run) -> str:
    """The seconds of a load: the median of its runs, with the shortest and the longest."""
    if not run.repeat_seconds:
        return _NONE
    middle, least, most = median_low(run.repeat_seconds), min(run.repeat_seconds), max(run.repeat_seconds)
    return f"{format_seconds(middle)} ({format_seconds(least)}-{format_seconds(most)})"


def _phase_column(name: str) -> TableColumn:
    def cell(run: Run) -> str:
        return format_seconds(run.phase_seconds[name]) if name in run.phase_seconds else _NONE

    return TableColumn(header=name.replace("_", "_\n"), cell=cell)


def memory_columns(unit: ByteUnit) -> tuple[TableColumn, ...]:
    """Return the columns of memory, all in one unit."""

    def column(header: str, figure: Callable[[Run], int | None]) -> TableColumn:
        def cell(run: Run) -> str:
            value = figure(run)
            return _NONE if value is None else format_number(value, unit=unit)

        return TableColumn(header=header, cell=cell)

    return (
        column("rank\nshard", lambda run: run.shard_bytes),
        column("rank\nanon", lambda run: run.worst_rank.anon_bytes),
        column("others\nanon", lambda run: run.others_anon_bytes),
        column("rank\nfile", lambda run: run.worst_rank.file_bytes),
        column("rank\nPSS", lambda run: run.worst_rank.pss_bytes),
        column("node\nanon", lambda run: run.node.anon_bytes),
        column("node\nfile", lambda run: run.node.file_bytes),
        column("node\nPSS", lambda run: run.node.pss_bytes),
        column("device\npeak", lambda run: run.device_peak_bytes),
    )


def unit_of(runs: Sequence[Run]) -> ByteUnit:
    """Return the unit of all memory columns."""
    # One unit for the whole table, so that columns can be compared with each other.
    figures = [
        value
        for run in runs
        for value in (run.node.anon_bytes, run.node.file_bytes, run.node.pss_bytes, run.device_peak_bytes)
    ]
    return "GiB" if max((value or 0 for value in figures), default=0) >= _GIB_FROM else "MiB"


def _headline(comparison: Mapping[str, Any], runs: Sequence[Run]) -> str:
    counted = counted_ranks(comparison, runs)
    return (
        f"{model_name(comparison)}{counted and ', '}{counted}. Times in seconds, memory in {unit_of(runs)}."
    )


def notes_of(runs: Sequence[Run]) -> list[str]:
    """Return what a reader must know of the figures, and the errors of modes that failed."""
    notes = [
        "Memory is the highest increase while loading and sharding (the step is not in it), counted from just after "
        "the imports.",
        "rank: the worst rank of each column. others: the worst rank but rank 0. node: all ranks of the node together, at one instant. shard: the "
        "largest one.",
        "anon: memory with no file behind it. file: pages of mapped files, which the kernel can take back and which "
        "are counted again for each rank that maps them. PSS: both, with shared pages divided among the ranks; it is "
        "sampled less often, so it may miss a short peak.",
    ]
    measures = dict.fromkeys(line.measures for run in runs for line in run.timelines)
    notes += [f"Measured: {text}." for text in measures]
    notes += [f"{run.mode} failed: {run.error}" for run in runs if run.error is not None]
    return notes
