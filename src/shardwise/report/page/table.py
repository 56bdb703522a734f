"""Tables of the page: rows become cards on a narrow screen, and stay a table for a screen reader."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.report.page.markup import Markup, element


def table(
    caption: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str | None]],
    *,
    number_columns: frozenset[int],
    class_: str | None = None,
) -> Markup:
    """Make a table whose first column names the row.

    Args:
        caption: What it shows.
        headers: One per column.
        rows: Their cells; None is an empty one.
        number_columns: Columns that are aligned as numbers.
        class_: Further class of the table.
    """
    # Roles are written out: a style that makes a row a card takes them away in some browsers.
    head = element(
        "tr",
        *(
            element("th", header, scope="col", role="columnheader", class_=_kind(index, number_columns))
            for index, header in enumerate(headers)
        ),
        role="row",
    )
    body = [
        element(
            "tr",
            element("th", row[0], scope="row", role="rowheader"),
            *(
                element(
                    "td",
                    # In an element of its own, so that on a card the label and it stand apart.
                    element("span", cell or "-"),
                    role="cell",
                    class_=_kind(index, number_columns),
                    data_label=headers[index],
                )
                for index, cell in enumerate(row[1:], start=1)
            ),
            role="row",
        )
        for row in rows
    ]
    return element(
        "table",
        element("caption", caption),
        element("thead", head, role="rowgroup"),
        element("tbody", *body, role="rowgroup"),
        role="table",
        class_=class_,
    )


def _kind(index: int, number_columns: frozenset[int]) -> str | None:
    return "number" if index in number_columns else None
