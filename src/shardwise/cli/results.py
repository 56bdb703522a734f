"""What a comparison leaves on the terminal and on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.text import Text

from shardwise.errors import MissingDependencyError

if TYPE_CHECKING:
    from shardwise.compare.experiment import Comparison

LOG_FOLDER: Final = "logs"

_MOST_NAMES: Final = 5


def show(comparison: Comparison, *, output_directory: Path, json_file: Path | None) -> None:
    """Print the table and what was found equal, and write `report.json` and `report.png`.

    Args:
        comparison: What came out.
        output_directory: Where the two files are written; made where it is missing.
        json_file: Where the document is written too; None for nowhere else.
    """
    from shardwise.report import render, save_figure

    console = Console(highlight=False)
    output_directory.mkdir(parents=True, exist_ok=True)
    json_files = [output_directory / "report.json", *([json_file] if json_file is not None else [])]
    for path in json_files:
        comparison.save(path)
    render(comparison.document, console)
    for line in [
        *agreement_lines(comparison),
        *_answer_lines(comparison),
        *fine_tuning_lines(comparison.document.get("fine_tuning")),
    ]:
        console.print(Text(line), soft_wrap=True)
    written = list(map(str, json_files))
    picture = output_directory / "report.png"
    try:
        save_figure(comparison.document, picture)
        written.append(str(picture))
    except MissingDependencyError as error:
        console.print(Text(f"No picture: {error}"), soft_wrap=True)
    console.print(Text(f"Written: {', '.join(written)}"), soft_wrap=True)
    if comparison.failed_modes:
        console.print(Text(f"Output of the failed ranks: {output_directory / LOG_FOLDER}"), soft_wrap=True)


def agreement_lines(comparison: Comparison) -> list[str]:
    """Say whether the modes ended with the same model, and name what differs."""
    found: dict[str, Any] = comparison.document["agreement"]
    counted = f"{found['parameters']} parameters and {found['buffers']} buffers"
    if found["equal"] is None:
        return ["Values were not compared: fewer than two runs looked at theirs."]
    if found["equal"]:
        failed = f"; failed: {', '.join(comparison.failed_modes)}" if comparison.failed_modes else ""
        compared = "All runs" if not failed else "The runs that came to their end"
        return [
            f"{compared} ended with equal parameters, buffers and logits ({counted}, byte for byte){failed}."
        ]
    lines = []
    for difference in found["differences"]:
        names = difference["tensors"]
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        what = [f"{len(names)} of {counted} ({', '.join(names[:_MOST_NAMES])}{more})"] if names else []
        what += ["the logits"] if difference["logits"] else []
        lines.append(
            f"NOT EQUAL: {difference['mode']} differs from {found['reference']} in {' and in '.join(what)}."
        )
    return lines


def fine_tuning_lines(found: Mapping[str, Any] | None) -> list[str]:
    """Say how a fine-tuning on shards compares with the same in one process; nothing where there was none."""
    if found is None:
        return []
    losses = found["losses"]
    same = "the same tokens" if found["answers_alike"] else "OTHER TOKENS"
    return [
        f"Fine-tuned {len(losses)} steps on {found['ranks']} ranks: loss {losses[0]:.4f}, at the end {losses[-1]:.4f}. One process: "
        f"{found['plain_losses'][0]:.4f}, at the end {found['plain_losses'][-1]:.4f}; no step differs by more than "
        f"{100 * found['largest_difference']:.2g} %.",
        f"Exported; a plain from_pretrained in one process goes on from the same words with {same} as the sharded model: "
        f'"{found["answer"].strip()}"',
    ]


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
