"""Tables for terminals of any width: what does not fit beside each other comes in further tables, and no figure is ever cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import Box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledColumn:
    """A column of a table, with its cells.

    Args:
        header: In one line or more.
        cells: One for each row.
        justify: `right` for figures.
    """

    header: str
    cells: Sequence[str]
    justify: Literal["left", "right"]


def table_of(columns: Sequence[FilledColumn], *, box: Box | None) -> Table:
    """Make one table.

    Args:
        columns: From left to right.
        box: Lines around cells; None for none.
    """
    table = Table(box=box, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column.header, justify=column.justify, no_wrap=True, vertical="bottom")
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, row))
    return table


def print_fitted(
    console: Console, names: FilledColumn, groups: Sequence[Sequence[FilledColumn]], *, box: Box | None
) -> None:
    """Print columns as one table; in a terminal that is too narrow as one of each group, or more, each with the rows' names.

    Where there is no terminal, or it is narrower than the names and one column, lines are as long as they must be.

    Args:
        console: Where to print; it is left as it was.
        names: Of the rows.
        groups: Of columns that belong together.
        box: Lines around cells; None for none.
    """

    def width_of(columns: Sequence[FilledColumn]) -> int:
        table = table_of([names, *columns], box=box)
        return Measurement.get(console, console.options.update(width=10_000), table).maximum

    parts = [[column for group in groups for column in group]]
    if console.is_terminal and width_of(parts[0]) > console.width:
        parts = []
        for group in groups:
            part: list[FilledColumn] = []
            for column in group:
                if part and width_of([*part, column]) > console.width:
                    parts.append(part)
                    part = []
                part.append(column)
            parts.append(part)
    width_before = console.width
    try:
        for part in parts:
            console.width = max(width_before, width_of(part))
            console.print(table_of([names, *part], box=box))
    finally:
        console.width = width_before
