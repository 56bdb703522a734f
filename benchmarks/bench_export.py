"""From shards to a directory that from_pretrained loads: shardwise, save_pretrained of a gathered state dict, torch's DCP writer.

    python benchmarks/bench_export.py [--kind dense | --model DIR] [--ranks 2] [--repeats 3] [--dtype auto]

The ways run in turn, each time in fresh processes that have loaded one generated checkpoint of 1 B parameters in bf16 into
copied shards. Printed are medians over the repeats: seconds until the call returns, seconds until everything is on storage
(`sync`; shardwise's own call includes that), the highest increase of anonymous host memory on any rank. torch's writer
writes each rank's shards and then puts them together into whole files, which it needs for a directory that loads; it
knows no conversions, so a mixture of experts is left out for it. The floor writes as many bytes, each rank to a file of its own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import export_workers
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
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the shards"
    )
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints are written; default: the temporary directory"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="bench-export-", dir=options.folder) as folder:
        model = checkpoint_of(options, folder, console)
        ways = [way for way in export_workers.WAYS if options.kind != "moe" or not way.startswith("DCP")]
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for repeat in range(options.repeats):
            for number, (way, results) in enumerate(runs.items()):
                console.print(f"run {repeat + 1} of {options.repeats}: {way}")
                by_rank = run_ranks(
                    export_workers.measure,
                    {
                        "model": model,
                        "output": f"{folder}/out",
                        "way": way,
                        "dtype": options.dtype,
                    },
                    ranks=options.ranks,
                    log_directory=Path(folder) / f"logs-{number}-{repeat}",
                    progress=lambda _text: None,
                )
                results.append(_summary(by_rank))
    _print(runs, console)
    found = {way: [run.pop("checksum") for run in results] for way, results in runs.items()}
    checksums = [each for way, of_way in found.items() if way != export_workers.RAW for each in of_way]
    equal = all(each == checksums[0] for each in checksums)
    console.print(f"all ways wrote the same tensors: {equal}")
    floor = "as many bytes written and synced by each rank to a file of its own"
    write_figures(options.json, "export", options, floor=floor, runs=runs, equal=equal)


def _summary(by_rank: dict[int, Any]) -> dict[str, Any]:
    return {
        "seconds": max(result["seconds"] for result in by_rank.values()),
        "stored_seconds": max(result["stored_seconds"] for result in by_rank.values()),
        "peak_bytes": max(result["host_anon_peak_bytes"] for result in by_rank.values()),
        "phases": by_rank[0]["phases"],
        "checksum": by_rank[0]["checksum"],
    }


def _print(runs: dict[str, list[dict[str, Any]]], console: Console) -> None:
    table = Table("way", "returned, s", "on storage, s", "peak, MiB")
    for way, results in runs.items():
        table.add_row(
            way,
            f"{statistics.median(run['seconds'] for run in results):.2f}",
            f"{statistics.median(run['stored_seconds'] for run in results):.2f}",
            f"{statistics.median(run['peak_bytes'] for run in results) / _MEBIBYTE:.0f}",
        )
    console.print(table)
    for way, results in runs.items():
        if results[0]["phases"]:
            parts = [
                f"{name} {statistics.median(run['phases'].get(name, 0) for run in results):.2f}"
                for name in results[0]["phases"]
            ]
            console.print(f"{way}, phases in seconds: {', '.join(parts)}", soft_wrap=True)


if __name__ == "__main__":
    main()
