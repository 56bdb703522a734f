"""Write one of the generated checkpoints of 1 B parameters that the README's figures are measured on.

    python benchmarks/generate.py dense DIRECTORY
    python benchmarks/generate.py moe DIRECTORY     # 64 experts, each with matrices of its own on disk

bf16, four files, random values that depend on tensor names alone: the same bytes on every machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from shardwise.compare.generated import generate_checkpoint


def main() -> None:
    """Write the checkpoint and say what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("dense", "moe"))
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    written = generate_checkpoint(
        options.directory,
        config_kind=options.kind,
        parameters=1_000_000_000,
        dtype=torch.bfloat16,
        seed=0,
        files=4,
    )
    print(f"{written.directory}: {written.parameters:,} parameters in {written.tensors:,} tensors")


if __name__ == "__main__":
    main()
