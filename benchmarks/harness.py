"""What the benchmarks share: the checkpoint they run on, and the file their figures go to."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from shardwise.compare.environment import describe_environment
from shardwise.compare.generated import generate_checkpoint
from shardwise.report import agreement_lines, save_figure
from shardwise.report.comparison import read_comparison
from shardwise.report.table import memory_columns, notes_of, time_columns, unit_of

_COLOURS = 128  # of a picture that is committed, at two thirds of the size: a fifth of the bytes
_LONG_FIELDS = ("timelines", "step_timelines", "origins")  # of a run; the picture has what they say

SEED = 0
"""Of generated checkpoints: with it, and each tensor's name, their values are the same everywhere."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which checkpoint a benchmark runs on."""
    parser.add_argument("--parameters", type=int, default=1_000_000_000)
    parser.add_argument("--kind", choices=("dense", "moe"), default="dense", help="of the generated one")
    parser.add_argument("--model", help="a checkpoint directory, in place of a generated one")


def checkpoint_of(options: argparse.Namespace, folder: str, console: Console) -> str:
    """Return the directory of the checkpoint that the options ask for; generate it in `folder` if they name none."""
    if options.model is not None:
        return str(options.model)
    model = Path(folder) / "model"
    console.print(f"writing a {options.kind} checkpoint of {options.parameters:,} parameters")
    generate_checkpoint(
        model,
        config_kind=options.kind,
        parameters=options.parameters,
        dtype=torch.bfloat16,
        seed=SEED,
        files=4,
    )
    return str(model)


def write_table(path: Path, comparison: Mapping[str, Any], *, notes: Sequence[str] = ()) -> None:
    """Write the table of a comparison, and what must be known of it, as a part of a page of the documentation."""
    runs = read_comparison(comparison)
    unit = unit_of(runs)
    columns = (*time_columns(runs), *memory_columns(unit))
    if not any(run.device_peak_bytes for run in runs):
        columns = columns[:-1]
    rows = [
        ["mode", *(column.header.replace("_\n", "_").replace("\n", " ") for column in columns)],
        ["---", *("---:" for _ in columns)],
        *(
            [f"`{run.mode}`", *("-" if run.error is not None else column.cell(run) for column in columns)]
            for run in runs
        ),
    ]
    environment = comparison["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    ranks = max(run.world_size for run in runs)
    lines = [
        f"{comparison['model']}, {ranks} ranks, {environment['cpus']} CPUs; {versions}. Seconds and {unit}.",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        *(f"- {line}" for line in (*notes, *agreement_lines(comparison), *notes_of(runs)[3:])),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def save_picture(comparison: Mapping[str, Any], path: Path) -> None:
    """Draw a comparison into a PNG file that is small enough to be committed."""
    from PIL import Image

    save_figure(comparison, path)
    with Image.open(path) as drawn:
        smaller = (drawn.width * 2 // 3, drawn.height * 2 // 3)
        few = (
            drawn.convert("RGB")
            .resize(smaller, Image.Resampling.LANCZOS)
            .quantize(_COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        )
    few.save(path, optimize=True)


def to_be_shown(document: Mapping[str, Any], *, model: str) -> dict[str, Any]:
    """Return a comparison with its model in words, and of errors the reason alone: their folders are gone, and were this machine's."""
    runs = [{**run, "model": model} for run in document["runs"]]
    for run in runs:
        if run.get("error"):
            run["error"] = _reason(run["error"])
    return {**document, "model": model, "runs": runs}


def _reason(error: str) -> str:
    said, *_ = error.split(" The output of every rank is in ")
    first, *lines = said.splitlines()
    if not lines:
        return first
    return f"{first.split(' Its last lines were:')[0]} {lines[-1].split(']: ', 1)[-1]}"


def figures_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a comparison without what is long: its timelines, and where each tensor came from."""
    runs = [{key: value for key, value in run.items() if key not in _LONG_FIELDS} for run in document["runs"]]
    return {**document, "runs": runs}


def write_figures(
    path: Path | None, benchmark: str, options: argparse.Namespace, *, floor: str, **figures: Any
) -> None:
    """Write a benchmark's figures as JSON, with its options and what they were measured on; do nothing without a path.

    Args:
        path: Of the file, or None.
        benchmark: Its name.
        options: As parsed.
        floor: Beside what the figures are to be read: the least that the same result can cost.
        **figures: The rest of the document.
    """
    if path is None:
        return
    document = {
        "benchmark": benchmark,
        "commit": commit(),
        "seed": SEED,
        "device": devices(),
        "floor": floor,
        "environment": describe_environment(),
        "options": {key: _without_folders(value) for key, value in vars(options).items()},
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _without_folders(value: Any) -> str:
    """Return an option as text; of a path its last part, since the rest says something about the machine alone."""
    text = str(value)
    return Path(text).name if Path(text).is_absolute() else text


def commit() -> str | None:
    """Return the commit of this checkout, marked where sources differ from it; None where there is none."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../src", "."], check=False)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + (" and changes" if changed.returncode else "")


def devices() -> list[str]:
    """Return the names of the processor and of the accelerators that torch sees."""
    found = []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        found = [f"{len(lines)} x {lines[0].split(':', 1)[1].strip()}"] if lines else []
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        module = torch.get_device_module(accelerator)
        found += [module.get_device_name(index) for index in range(torch.accelerator.device_count())]
    return found
