"""Run a 4-rank command many times and count its exit statuses; each must be the same.

    python benchmarks/exit_status.py [--runs 20] [--ranks 4]

The command is torchrun on `examples/native.py` and a small generated checkpoint: build, shard, fill, one step, leave.
"""

from __future__ import annotations

import argparse
import collections
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from shardwise.compare.generated import generate_checkpoint

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TIMEOUT_SECONDS = 300


def main() -> int:
    """Run the command and print the counts; 0 if all statuses are 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--example", default="native.py")
    options = parser.parse_args()
    statuses: collections.Counter[int] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="exit-status-") as folder:
        model = Path(folder) / "model"
        generate_checkpoint(
            model, config_kind="dense", parameters=1_000_000, dtype=torch.bfloat16, seed=0, files=1
        )
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={options.ranks}", str(EXAMPLES / options.example), str(model)),
        ]
        for run in range(options.runs):
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
            )
            statuses[done.returncode] += 1
            print(f"run {run + 1} of {options.runs}: {done.returncode}", flush=True)
            if done.returncode:
                print(done.stderr[-3000:], flush=True)
    print("exit statuses:", dict(statuses))
    return 0 if set(statuses) == {0} else 1


if __name__ == "__main__":
    sys.exit(main())
