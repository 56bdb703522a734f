"""`shardwise report`: the page, the trace and the picture of what was measured before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.text import Text

from shardwise.cli.options import DebugOption
from shardwise.cli.terminal import errors_reported
from shardwise.errors import ConfigurationError

_PAGE_SUFFIX: Final = ".html"


def report_command(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="One report.json of compare or demo, one saved LoadReport, or the saved memory profiles of some ranks.",
            show_default=False,
        ),
    ],
    html_file: Annotated[
        Path | None,
        typer.Option(
            "--html",
            help="Write the page to this file; default: beside the first of FILES, unless another output is asked for.",
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    trace_file: Annotated[
        Path | None,
        typer.Option(
            "--trace", help="Write a trace for Perfetto to this file.", dir_okay=False, show_default=False
        ),
    ] = None,
    png_file: Annotated[
        Path | None,
        typer.Option(
            "--png",
            help="Draw the comparison to this file (.png, .svg or .pdf).",
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Write FILES, which were measured before, as a page for the browser, a trace for Perfetto, or a picture."""
    with errors_reported(debug=debug):
        documents = [_read(path) for path in files]
        from shardwise.report import save_figure, save_page, save_trace

        if html_file is None and trace_file is None and png_file is None:
            html_file = files[0].with_suffix(_PAGE_SUFFIX)
        written = []
        if html_file is not None:
            save_page(documents, html_file)
            written.append(html_file)
        if trace_file is not None:
            save_trace(documents, trace_file)
            written.append(trace_file)
        if png_file is not None:
            if len(documents) > 1:
                raise ConfigurationError(
                    f"--png: expected one comparison, got {len(documents)} files. Use --html or --trace for memory profiles."
                )
            save_figure(documents[0], png_file)
            written.append(png_file)
        Console(highlight=False).print(Text(f"Written: {', '.join(map(str, written))}"), soft_wrap=True)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not text
        raise ConfigurationError(
            f"{path}: expected a JSON document, got {error}. Pass what `--json FILE` or `save` wrote."
        ) from error
    if not isinstance(document, dict):
        raise ConfigurationError(
            f"{path}: expected a JSON object, got {type(document).__name__}. Pass what `--json FILE` or `save` wrote."
        )
    return document
