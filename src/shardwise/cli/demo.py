"""`shardwise demo`: the comparison on a real model, with nothing to prepare."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from shardwise.cli.options import DebugOption, JsonOption, OutputOption, RanksOption
from shardwise.cli.results import LOG_FOLDER, show
from shardwise.cli.terminal import STATUS_FAILED, Progress, errors_reported, terminal_progress
from shardwise.compare.modes import modes_named

if TYPE_CHECKING:
    from shardwise.compare.fine_tune import FineTuning


def demo_command(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="A directory or a hub id; default: SmolLM2-135M-Instruct from the package index.",
            show_default=False,
        ),
    ] = None,
    ranks: RanksOption = 4,
    output_dir: OutputOption = Path(),
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Bring a real model up in every mode, check that all end with the same model, and fine-tune it on shards and in one process."""
    with errors_reported(debug=debug):
        from shardwise.compare.experiment import compare
        from shardwise.compare.launch import refuse_inside_launcher
        from shardwise.compare.requirements import require_for_demo

        refuse_inside_launcher("shardwise demo", environ=os.environ)
        require_for_demo()
        with terminal_progress() as progress:
            checkpoint = model or str(_own_model(progress))
            comparison = compare(
                checkpoint,
                ranks=ranks,
                modes=modes_named(()),
                dtype="auto",
                log_directory=output_dir / LOG_FOLDER,
                progress=progress,
            )
        is_good = comparison.is_good
        if model is None and is_good:
            tuned = _fine_tuned(checkpoint, output_dir, ranks=ranks)
            if tuned is not None:
                document = {**comparison.document, "fine_tuning": tuned.to_json()}
                comparison, is_good = replace(comparison, document=document), tuned.is_good
        show(comparison, output_directory=output_dir, json_file=json_file)
        _print_what_next(checkpoint, ranks=ranks)
    if not is_good:
        raise typer.Exit(STATUS_FAILED)


def _fine_tuned(checkpoint: str, output_directory: Path, *, ranks: int) -> FineTuning | None:
    """Fine-tune the demo's own model, on shards and in one process; None where that cannot be done here."""
    from shardwise.compare.fine_tune import fine_tune, why_not

    reason = why_not(Path(checkpoint), ranks=ranks)
    if reason is not None:
        Console(stderr=True, highlight=False).print(Text(f"No fine-tuning: {reason}"), soft_wrap=True)
        return None
    output_directory.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".fine-tuning-", dir=output_directory) as folder,
        terminal_progress() as progress,
    ):
        return fine_tune(Path(checkpoint), Path(folder), ranks=ranks, progress=progress)


def _print_what_next(checkpoint: str, *, ranks: int) -> None:
    # As it was called: `make demo` has it in .venv/bin, which is not on the path.
    called = sys.argv[0] if Path(sys.argv[0]).name == "shardwise" else "python -m shardwise"
    command = f"{called} verify {shlex.quote(checkpoint)} --ranks {ranks}"
    Console(highlight=False).print(Text(f"Model: {checkpoint}\nTry: {command}"), soft_wrap=True)


def _own_model(progress: Progress) -> Path:
    from shardwise.compare.demo_model import ModelUnavailableError, demo_model
    from shardwise.compare.small_model import small_random_model

    try:
        return demo_model(progress)
    except ModelUnavailableError as error:
        Console(stderr=True, highlight=False).print(
            Text(f"{error}\nGoing on with a small random model instead; it has no answer to give."),
            soft_wrap=True,
        )
        return small_random_model(progress)
