"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RanksOption = Annotated[int, typer.Option("--ranks", min=1, help="Number of local ranks.")]
OutputOption = Annotated[
    Path,
    typer.Option(
        "--output-dir",
        help="Where report.json, report.html, report.trace.json and report.png are written.",
        file_okay=False,
    ),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the report as JSON to this file too.", dir_okay=False)
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]
