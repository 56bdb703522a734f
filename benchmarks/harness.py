"""What the benchmarks share: the checkpoint they run on, and the file their figures go to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from shardwise.compare.environment import describe_environment
from shardwise.compare.generated import generate_checkpoint


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
        seed=0,
        files=4,
    )
    return str(model)


def write_figures(path: Path | None, benchmark: str, options: argparse.Namespace, **figures: Any) -> None:
    """Write a benchmark's figures as JSON, with its options and the environment; do nothing without a path."""
    if path is None:
        return
    document = {
        "benchmark": benchmark,
        "environment": describe_environment(),
        "options": {key: str(value) for key, value in vars(options).items()},
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
