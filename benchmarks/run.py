"""Run the benchmarks one after the other, each with the options that its committed figures have; or list them.

    make bench   # or: python benchmarks/run.py [NAME ...] [--list] [--results DIR]

Each writes its table to the terminal and its figures to the results' folder, as JSON with device, versions, commit, seed and floor. A benchmark that fails
does not keep the others from running; the status is 1 then. What needs an accelerator, or root, is left out where there is none, and said.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_WITHOUT_WHOLE = (
    "floor",
    "raw read",
    "raw read, kept",
    "shardwise, mapped",
    "shardwise, copied",
    "transformers",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One command.

    Args:
        result: Name of the figures' file; it names the benchmark too, without its ending.
        command: The program in this folder, and its options.
        floor: What its rows are to be read beside.
        needs: `root` or `accelerator`, or nothing.
    """

    result: str
    command: tuple[str, ...]
    floor: str
    needs: str = ""

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        return self.result.removesuffix(".json")


def _ways(*names: str) -> tuple[str, ...]:
    return tuple(part for name in names for part in ("--way", name))


_DIRECT = "model on meta and `fully_shard`; raw read of as many bytes with as many threads"
BENCHMARKS = (
    Benchmark(result="direct-1-rank.json", command=("bench_direct.py", "--ranks", "1"), floor=_DIRECT),
    Benchmark(result="direct-2-ranks.json", command=("bench_direct.py",), floor=_DIRECT),
    Benchmark(
        result="direct-2-ranks-cold.json",
        command=("bench_direct.py", "--cold", *_ways(*_WITHOUT_WHOLE, "DCP reader")),
        floor=f"{_DIRECT}, from the disk",
        needs="root",
    ),
    Benchmark(
        result="direct-2-ranks-cold-4b.json",
        command=(
            "bench_direct.py",
            *("--cold", "--parameters", "4000000000"),
            *_ways("floor", "raw read", "shardwise, mapped"),
        ),
        floor=f"{_DIRECT}, from the disk",
        needs="root",
    ),
    Benchmark(
        result="direct-2-ranks-float32.json",
        command=("bench_direct.py", "--dtype", "float32", *_ways(*_WITHOUT_WHOLE, "DCP reader")),
        floor=_DIRECT,
    ),
    Benchmark(
        result="direct-4-ranks.json",
        command=("bench_direct.py", "--ranks", "4", *_ways(*_WITHOUT_WHOLE, "DCP reader")),
        floor=_DIRECT,
    ),
    Benchmark(
        result="direct-moe-2-ranks.json",
        command=("bench_direct.py", "--kind", "moe", "--repeats", "5"),
        floor=f"{_DIRECT}; the same into fresh memory",
    ),
    Benchmark(
        result="small.json",
        command=("bench_small.py",),
        floor="the same bytes in large tensors; of the model: as `bench_direct.py`",
    ),
    Benchmark(
        result="growth.json",
        command=("bench_growth.py", "--plot", str(_HERE.parent / "docs" / "growth.png")),
        floor="model on meta and `fully_shard`",
    ),
    Benchmark(
        result="rank0-bfloat16.json",
        command=("bench_rank0.py",),
        floor="as many bytes sent from one buffer of rank 0",
    ),
    Benchmark(
        result="rank0-float32.json",
        command=("bench_rank0.py", "--dtype", "float32"),
        floor="as many bytes sent from one buffer of rank 0",
    ),
    Benchmark(
        result="export.json",
        command=("bench_export.py",),
        floor="as many bytes written and synced by each rank",
    ),
    Benchmark(
        result="node-ranks.json",
        command=("bench_node.py", "--part", "node", "--parameters", "500000000"),
        floor="the ranks' shards where they are copied, else nothing",
    ),
    Benchmark(
        result="node-meshes.json",
        command=("bench_node.py", "--part", "meshes"),
        floor="the ranks' shards; the checkpoint's bytes",
    ),
    Benchmark(
        result="predicted.json",
        command=("bench_predicted.py",),
        floor="what is measured, beside each prediction",
    ),
    Benchmark(
        result="plan.json",
        command=("bench_plan.py",),
        floor="headers read and parsed, or the model on meta, and nothing planned",
    ),
    Benchmark(result="sampler.json", command=("bench_sampler.py",), floor="the same loop without a profile"),
    Benchmark(
        result="gpu.json",
        command=("gpu.py",),
        floor="pinned copy of as many bytes to the device; warm read of them",
        needs="accelerator",
    ),
)


def main() -> int:
    """Run those that are named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--results", type=Path, default=_HERE / "results")
    options = parser.parse_args()
    names = [each.name for each in BENCHMARKS]
    if not set(options.names) <= set(names):
        parser.error(f"expected names of {', '.join(names)}")
    failed = []
    for benchmark in BENCHMARKS:
        if options.names and benchmark.name not in options.names:
            continue
        program, *arguments = benchmark.command
        result = str(options.results / benchmark.result)
        command = [sys.executable, str(_HERE / program), *arguments, "--json", result]
        if options.list:
            print(f"{benchmark.name}: {' '.join(benchmark.command)}")
            continue
        if benchmark.needs and not _has(benchmark.needs):
            print(f"[bench] {benchmark.name}: not measured (needs {benchmark.needs})", flush=True)
            continue
        print(f"[bench] {benchmark.name}: floor: {benchmark.floor}", flush=True)
        began = time.monotonic()
        if subprocess.run(command, check=False).returncode:
            failed.append(benchmark.name)
        print(f"[bench] {benchmark.name}: {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        print(f"[bench] failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _has(what: str) -> bool:
    return os.geteuid() == 0 if what == "root" else torch.accelerator.is_available()


if __name__ == "__main__":
    sys.exit(main())
