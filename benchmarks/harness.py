"""What the benchmarks share: the checkpoint they run on, and the file their figures go to."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from shardwise.compare.environment import describe_environment
from shardwise.compare.generated import generate_checkpoint

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
        "options": {key: str(value) for key, value in vars(options).items()},
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


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
