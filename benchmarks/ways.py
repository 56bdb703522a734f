"""Run the ways of `direct_workers.py` in turn, each time in fresh processes, and put their medians side by side."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

import direct_workers
from shardwise.compare.launch import run_ranks
from shardwise.errors import CommandError

FLOOR = (
    "`floor` builds the model on meta and shards it, and reads nothing; `raw read` reads the same number of bytes with as many threads, "
    "into buffers that are used again, and builds nothing; `raw read, kept` reads them into fresh memory"
)
Runs = dict[str, list[dict[str, Any]]]


def run_ways(
    ways: Sequence[str],
    model: str,
    *,
    dtype: str,
    ranks: int,
    repeats: int,
    cold: bool,
    logs: Path,
    console: Console,
) -> Runs:
    """Run each way `repeats` times; one that fails is run once, and its row has the error.

    Args:
        ways: Keys of `direct_workers.WAYS`.
        model: Directory of the checkpoint.
        dtype: torch's name of it, or `auto`.
        ranks: Processes.
        repeats: Of each way.
        cold: Empty the page cache before each run, which needs root.
        logs: Folder for the ranks' output.
        console: Told what goes on.
    """
    checkpoint_bytes = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    runs: Runs = {way: [] for way in ways}
    for repeat in range(repeats):
        for way, results in runs.items():
            if results and "error" in results[-1]:
                continue
            console.print(f"run {repeat + 1} of {repeats}: {way}")
            if cold:
                subprocess.run(["sync"], check=True)
                Path("/proc/sys/vm/drop_caches").write_text("3\n")
            try:
                by_rank = run_ranks(
                    direct_workers.measure,
                    {"model": model, "dtype": dtype, "way": way},
                    ranks=ranks,
                    log_directory=logs / f"{way}-{repeat}",
                    progress=lambda _text: None,
                )
            except CommandError as error:
                message = str(error).split(" The output of every rank is in ")[0]
                results.append({"error": message})
                console.print(f"{way}: {message}", soft_wrap=True, markup=False)
            else:
                results.append(_summary(by_rank, checkpoint_bytes))
    return runs


def _summary(by_rank: dict[int, Any], checkpoint_bytes: int) -> dict[str, Any]:
    results = by_rank.values()
    return {
        "ready_seconds": max(result["ready_seconds"] for result in results),
        "resident_seconds": max(result["resident_seconds"] for result in results),
        "cpu_seconds": sum(result["cpu_seconds"] for result in results),
        "peak_bytes": max(result["host_anon_peak_bytes"] for result in results),
        "node_peak_bytes": sum(result["host_anon_peak_bytes"] for result in results),
        "shard_bytes": max(result["shard_bytes"] for result in results),
        # What is kept of the checkpoint; whole tensors are more than that on every rank.
        "needed_bytes_per_second": checkpoint_bytes / max(r["resident_seconds"] for r in results),
        # A report has the bytes of all ranks.
        "requested_share": by_rank[0]["requested_bytes"] / checkpoint_bytes,
        "disk_share": sum(result["disk_bytes"] for result in results) / checkpoint_bytes,
        "phases": by_rank[0]["phases"],
        "checksum": by_rank[0]["checksum"],
    }


def are_equal(runs: Runs) -> bool:
    """Return whether all ways that ended with values ended with the same."""
    found = {run.get("checksum") for way in runs if way not in direct_workers.FLOORS for run in runs[way]}
    return len(found - {None}) <= 1


def median_of(results: Sequence[dict[str, Any]], key: str) -> float:
    """Return the median of a figure."""
    return statistics.median(run[key] for run in results)


def print_ways(runs: Runs, console: Console) -> None:
    """Print a row for each way, and the phases of those that are shardwise's."""
    table = Table(
        Column("way", no_wrap=True),
        *("ready, s", "/ floor", "resident, s", "of raw read's rate", "needed GB/s", "CPU, s"),
        *(
            "rank's peak, MiB",
            "node's, MiB",
            "shard, MiB",
            "requested / checkpoint",
            "from disk / checkpoint",
        ),
    )
    floor = median_of(runs["floor"], "ready_seconds") if "floor" in runs else None
    raw = median_of(runs["raw read"], "ready_seconds") if "raw read" in runs else None
    for way, results in runs.items():
        if "error" in results[0]:
            table.add_row(way, "failed")
            continue
        ready = median_of(results, "ready_seconds")
        table.add_row(
            way,
            f"{ready:.2f}",
            f"{ready / floor:.2f}" if floor and way not in direct_workers.FLOORS else "",
            "" if way == "floor" else f"{median_of(results, 'resident_seconds'):.2f}",
            f"{raw / median_of(results, 'resident_seconds'):.0%}" if raw and way != "floor" else "",
            "" if way == "floor" else f"{median_of(results, 'needed_bytes_per_second') / 1e9:.2f}",
            f"{median_of(results, 'cpu_seconds'):.2f}",
            f"{median_of(results, 'peak_bytes') / 2**20:.0f}",
            f"{median_of(results, 'node_peak_bytes') / 2**20:.0f}",
            f"{median_of(results, 'shard_bytes') / 2**20:.0f}",
            f"{median_of(results, 'requested_share'):.3f}" if way.startswith("shardwise") else "",
            f"{median_of(results, 'disk_share'):.3f}",
        )
    console.print(table)
    for way, results in runs.items():
        if results[0].get("phases"):
            names = list(results[0]["phases"])
            parts = [f"{n} {statistics.median(r['phases'].get(n, 0) for r in results):.3f}" for n in names]
            console.print(f"{way}, phases of wrap_model in seconds: {', '.join(parts)}", soft_wrap=True)
        if "error" in results[0]:
            console.print(f"{way}: {results[0]['error']}", soft_wrap=True, markup=False)
