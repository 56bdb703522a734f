"""What commands leave on the terminal and on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.text import Text

from shardwise.cli.terminal import temporary_logs, terminal_progress
from shardwise.errors import MissingDependencyError

if TYPE_CHECKING:
    from shardwise.compare.experiment import Comparison

LOG_FOLDER: Final = "logs"


def show(comparison: Comparison, *, output_directory: Path, json_file: Path | None) -> None:
    """Write `report.json`, `report.html`, `report.trace.json` and `report.png`, and print the table and what was found equal.

    Args:
        comparison: What came out.
        output_directory: Where the files are written; made where it is missing.
        json_file: Where the document is written too; None for nowhere else.
    """
    from shardwise.report import (
        agreement_lines,
        fine_tuning_lines,
        render,
        save_figure,
        save_page,
        save_trace,
    )

    output_directory.mkdir(parents=True, exist_ok=True)
    json_files = [output_directory / "report.json", *([json_file] if json_file is not None else [])]
    for path in json_files:
        comparison.save(path)
    page, trace = output_directory / "report.html", output_directory / "report.trace.json"
    save_page([comparison.document], page)
    save_trace([comparison.document], trace)
    written = list(map(str, (*json_files, page, trace)))
    picture, no_picture = output_directory / "report.png", []
    try:
        save_figure(comparison.document, picture)
        written.append(str(picture))
    except MissingDependencyError as error:
        no_picture = [f"No picture: {error}"]
    # Only now, when all is on disk: who reads the output may have closed it.
    console = Console(highlight=False)
    render(comparison.document, console)
    for line in [
        *agreement_lines(comparison.document),
        *_answer_lines(comparison),
        *fine_tuning_lines(comparison.document.get("fine_tuning")),
        *no_picture,
        f"Written: {', '.join(written)}",
    ]:
        console.print(Text(line), soft_wrap=True)
    if comparison.failed_modes:
        console.print(Text(f"Output of the failed ranks: {output_directory / LOG_FOLDER}"), soft_wrap=True)


def write_json(document: Mapping[str, Any], path: Path) -> None:
    """Write what a command found, whole or not at all.

    Args:
        document: Plain data.
        path: File to write; missing directories are made.
    """
    from shardwise.profiling.whole_file import write_whole

    write_whole(path, json.dumps(document, indent=2) + "\n")


def run_on_ranks(
    worker: Callable[[Mapping[str, Any]], dict[str, Any]],
    arguments: Mapping[str, Any],
    *,
    ranks: int,
    json_file: Path | None,
) -> dict[int, dict[str, Any]]:
    """Run one function on local ranks, or on those of a launcher; print the first rank's summary, and write its report.

    Args:
        worker: Returns a rank's report as JSON, with its `summary`.
        arguments: Of the function.
        ranks: How many to start.
        json_file: Where the report is written; None for nowhere.

    Returns:
        The reports by rank; under a launcher this rank's own.

    Raises:
        CommandError: A rank failed.
    """
    from shardwise.compare.launch import run_ranks

    with terminal_progress() as progress, temporary_logs() as logs:
        reports = run_ranks(worker, arguments, ranks=ranks, log_directory=logs, progress=progress)
    # Under a launcher every rank is here with its own report, and all are equal: the first one speaks.
    report = reports.get(0)
    if report is not None:
        summary = report.pop("summary")
        if json_file is not None:
            write_json(report, json_file)  # first: who reads the output may have closed it
        print(summary)
    return reports


def _answer_lines(comparison: Comparison) -> list[str]:
    from shardwise.compare.question import QUESTION

    answers: dict[str, list[str]] = {}
    for run in comparison.document["runs"]:
        if run.get("answer"):
            answers.setdefault(run["answer"], []).append(run["mode"])
    return [
        f'Asked "{QUESTION}" the sharded model answers: "{answer}" ({", ".join(modes)})'
        for answer, modes in answers.items()
    ]
