"""From nothing to a sharded model with values: shardwise, transformers' own sharded load, torch's DCP reader.

    python benchmarks/bench_direct.py [--kind dense | --model DIR] [--ranks 2] [--repeats 3] [--dtype auto] [--cold]

The ways run in turn, each time in fresh processes on one generated Qwen3-shaped checkpoint of 1 B parameters in bf16; the
floor builds the model on meta and shards it, and reads nothing. With `--kind moe` each of 64 experts has matrices of its own
on disk, which transformers 5 keeps stacked: torch's DCP reader cannot do that and is left out. Printed are medians over the repeats: seconds until the
model is ready (every parameter bound to its storage) and until it is resident (every page of every shard touched), the
highest increase of anonymous host memory on any rank, the bytes that all ranks requested, and those that the kernel
fetched from disk for them. `--cold` empties the page cache before each run, which needs root.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import direct_workers
from harness import add_model_options, checkpoint_of, write_figures
from shardwise.compare.launch import run_ranks

_MEBIBYTE = 2**20


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--cold", action="store_true", help="empty the page cache before each run")
    parser.add_argument("--way", action="append", choices=tuple(direct_workers.WAYS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="bench-direct-") as folder:
        model = checkpoint_of(options, folder, console)
        checkpoint_bytes = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
        ways = options.way or [
            way for way in direct_workers.WAYS if options.kind != "moe" or way != "DCP reader"
        ]
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for repeat in range(options.repeats):
            for way, results in runs.items():
                console.print(f"run {repeat + 1} of {options.repeats}: {way}")
                if options.cold:
                    _empty_page_cache()
                by_rank = run_ranks(
                    direct_workers.measure,
                    {"model": model, "dtype": options.dtype, "way": way},
                    ranks=options.ranks,
                    log_directory=Path(folder) / f"{way}-{repeat}",
                    progress=lambda _text: None,
                )
                results.append(_summary(by_rank, checkpoint_bytes))
    _print(runs, console)
    checksums = {run["checksum"] for way, results in runs.items() if way != "floor" for run in results}
    console.print(f"all ways ended with equal values: {len(checksums) <= 1}")
    write_figures(
        options.json,
        "direct",
        options,
        checkpoint_bytes=checkpoint_bytes,
        runs=runs,
        equal=len(checksums) <= 1,
    )


def _empty_page_cache() -> None:
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def _summary(by_rank: dict[int, Any], checkpoint_bytes: int) -> dict[str, Any]:
    return {
        "ready_seconds": max(result["ready_seconds"] for result in by_rank.values()),
        "resident_seconds": max(result["resident_seconds"] for result in by_rank.values()),
        "peak_bytes": max(result["host_anon_peak_bytes"] for result in by_rank.values()),
        "shard_bytes": max(result["shard_bytes"] for result in by_rank.values()),
        # A report has the bytes of all ranks.
        "requested_share": by_rank[0]["requested_bytes"] / checkpoint_bytes,
        "disk_share": sum(result["disk_bytes"] for result in by_rank.values()) / checkpoint_bytes,
        "phases": by_rank[0]["phases"],
        "checksum": by_rank[0]["checksum"],
    }


def _print(runs: dict[str, list[dict[str, Any]]], console: Console) -> None:
    table = Table(
        "way",
        "ready, s",
        "resident, s",
        "peak, MiB",
        "shard, MiB",
        "requested / checkpoint",
        "from disk / checkpoint",
    )
    for way, results in runs.items():

        def median(key: str, results: list[dict[str, Any]] = results) -> float:
            return statistics.median(run[key] for run in results)

        table.add_row(
            way,
            f"{median('ready_seconds'):.2f}",
            "" if way == "floor" else f"{median('resident_seconds'):.2f}",
            f"{median('peak_bytes') / _MEBIBYTE:.0f}",
            f"{median('shard_bytes') / _MEBIBYTE:.0f}",
            f"{median('requested_share'):.3f}" if way.startswith("shardwise") else "",
            f"{median('disk_share'):.3f}",
        )
    console.print(table)
    for way, results in runs.items():
        if results[0]["phases"]:
            names = list(results[0]["phases"])
            parts = [f"{n} {statistics.median(r['phases'].get(n, 0) for r in results):.3f}" for n in names]
            console.print(f"{way}, phases of wrap_model in seconds: {', '.join(parts)}", soft_wrap=True)


if __name__ == "__main__":
    main()
