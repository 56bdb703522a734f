"""Rank 0 alone reads or holds a model; every rank ends with its shard: shardwise and torch's `set_model_state_dict`.

    python benchmarks/bench_rank0.py [--parameters 1000000000] [--ranks 4] [--repeats 3] [--dtype bfloat16]

The ways run in turn, each time in fresh processes on one generated Qwen3-shaped checkpoint. From files, rank 0 reads through
staging buffers what it sends; otherwise it has loaded the model before. The floors send as many bytes: from one buffer into one, and
from files into fresh memory. Printed are medians over the repeats: seconds from
the loaded (or empty) model to filled shards on all ranks, the same with the load before it, and the anonymous host memory
of rank 0 and of the worst other rank over both. Figures go to `--json` as well.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import rank0_workers
from harness import add_model_options, checkpoint_of, write_figures
from shardwise.compare.launch import run_ranks


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="bench-rank0-") as folder:
        model = checkpoint_of(options, folder, console)
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in rank0_workers.WAYS}
        for repeat in range(options.repeats):
            for way, results in runs.items():
                console.print(f"run {repeat + 1} of {options.repeats}: {way}")
                by_rank = run_ranks(
                    rank0_workers.measure,
                    {"model": model, "dtype": options.dtype, "way": way},
                    ranks=options.ranks,
                    log_directory=Path(folder) / f"{way}-{repeat}",
                    progress=lambda _text: None,
                )
                results.append(_summary(by_rank))
    checksums = {run["checksum"] for results in runs.values() for run in results} - {None}
    equal = len(checksums) == 1
    _print(runs, console)
    console.print(f"all ways ended with equal shards: {equal}")
    floor = (
        "as many bytes as the other ranks' shards have, sent from one buffer of rank 0 into one of each; or read by rank 0 and sent "
        "into fresh memory of each"
    )
    write_figures(options.json, "rank0", options, floor=floor, runs=runs, equal=equal)


def _summary(by_rank: dict[int, Any]) -> dict[str, Any]:
    return {
        "seconds": max(result["seconds"] for result in by_rank.values()),
        "load_seconds": max(result["load_seconds"] for result in by_rank.values()),
        "source_peak_bytes": by_rank[0]["host_anon_peak_bytes"],
        "other_peak_bytes": max(r["host_anon_peak_bytes"] for rank, r in by_rank.items() if rank != 0),
        "checksum": by_rank[0]["checksum"],
    }


def _print(runs: dict[str, list[dict[str, Any]]], console: Console) -> None:
    table = Table(
        "way", "seconds", "lowest", "highest", "with load", "rank 0 peak, MiB", "worst other rank's peak, MiB"
    )
    for way, results in runs.items():
        seconds = [run["seconds"] for run in results]
        table.add_row(
            way,
            f"{statistics.median(seconds):.2f}",
            f"{min(seconds):.2f}",
            f"{max(seconds):.2f}",
            f"{statistics.median(run['seconds'] + run['load_seconds'] for run in results):.2f}",
            f"{statistics.median(run['source_peak_bytes'] for run in results) / 2**20:.0f}",
            f"{statistics.median(run['other_peak_bytes'] for run in results) / 2**20:.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
