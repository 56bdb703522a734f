"""Many small tensors against the same bytes in large ones: seconds of `materialize`, and the reads that it makes.

    python benchmarks/bench_small.py [--tensors 20000] [--large 64] [--ranks 2] [--repeats 3] [--part materialize] [--part model]

*materialize*: the checkpoints are generated, 1 GB each in bf16, and filled in turn in fresh processes, copied and mapped. Rows that the ranks
divide can be mapped; of others the last rank's shard needs padding, so that many small tensors of them are exchanged even where
mapping is allowed. The small ones are taken with both kinds of rows. The reads are the calls of the busiest rank. The model is
built and sharded before the clock starts; what `fully_shard` took for it is printed beside, and the same bytes in large tensors are the
floor.

*model*: transformers loads no bag of parameters, so this takes a real class: Qwen3 of as many narrow layers as have that many tensors, each layer a
unit of `fully_shard`. shardwise, transformers' `DistributedConfig` and the floors bring it up from nothing, as in `bench_direct.py`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

import small_workers
from harness import write_figures
from shardwise.compare.launch import run_ranks
from small_model import write_narrow_model
from ways import FLOOR, are_equal, print_ways, run_ways

_COLUMNS = 256
_ELEMENTS = 500_000_000
_WAYS = ("floor", "raw read", "shardwise, mapped", "shardwise, copied", "transformers")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tensors", type=int, default=20_000)
    parser.add_argument("--large", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", action="append", choices=("materialize", "model"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=160)
    figures: dict[str, Any] = {}
    if options.part is None or "materialize" in options.part:
        figures["runs"] = _materialize(options, console)
    if options.part is None or "model" in options.part:
        figures |= _model(options, console)
    floor = "the same bytes in large tensors, of which `materialize` does the same; of the model: "
    write_figures(options.json, "small", options, floor=floor + FLOOR, **figures)


def _model(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-small-") as folder:
        model = Path(folder) / "model"
        tensors = write_narrow_model(model, tensors=options.tensors)
        runs = run_ways(
            _WAYS,
            str(model),
            dtype="auto",
            ranks=options.ranks,
            repeats=options.repeats,
            cold=False,
            logs=Path(folder) / "logs",
            console=console,
        )
    console.print(f"a model of {tensors:,} tensors:")
    print_ways(runs, console)
    equal = are_equal(runs)
    console.print(f"all ways ended with equal values: {equal}")
    return {"model_tensors": tensors, "model": runs, "equal": equal}


def _materialize(options: argparse.Namespace, console: Console) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-small-") as folder:
        kinds = {}
        for name, count, spare in (
            ("small", options.tensors, 0),
            ("small, uneven", options.tensors, 1),
            ("large", options.large, 0),
        ):
            rows = _rows(count, ranks=options.ranks, spare=spare)
            directory = Path(folder) / name.replace(", ", "-")
            directory.mkdir()
            values = {f"w{i}": torch.empty(rows, _COLUMNS, dtype=torch.bfloat16) for i in range(count)}
            save_file(values, directory / "model.safetensors")
            kinds[name] = {"model": str(directory), "count": count, "rows": rows, "columns": _COLUMNS}
            del values
        for repeat in range(options.repeats):
            for name, arguments in kinds.items():
                for cpu_storage in ("copy", "auto"):
                    key = _key(arguments, cpu_storage, ranks=options.ranks)
                    console.print(f"run {repeat + 1} of {options.repeats}: {key}")
                    by_rank = run_ranks(
                        small_workers.measure,
                        {**arguments, "cpu_storage": cpu_storage},
                        ranks=options.ranks,
                        log_directory=Path(folder) / f"{name.replace(', ', '-')}-{cpu_storage}-{repeat}",
                        progress=lambda _text: None,
                    )
                    runs.setdefault(key, []).append(
                        {
                            "seconds": max(result["seconds"] for result in by_rank.values()),
                            "shard_seconds": max(result["shard_seconds"] for result in by_rank.values()),
                            "reads": max(result["reads"] for result in by_rank.values()),
                            "phases": by_rank[0]["phases"],
                        }
                    )
    table = Table("checkpoint of 1 GB", "seconds", "fully_shard before it", "reads")
    for key, results in runs.items():
        seconds = statistics.median(run["seconds"] for run in results)
        shard_seconds = statistics.median(run["shard_seconds"] for run in results)
        table.add_row(
            key, f"{seconds:.2f}", f"{shard_seconds:.2f}", f"{max(run['reads'] for run in results)}"
        )
    console.print(table)
    for key, results in runs.items():
        parts = ", ".join(f"{name} {value:.2f}" for name, value in results[0]["phases"].items())
        console.print(f"{key}: {parts}", soft_wrap=True)
    return runs


def _rows(count: int, *, ranks: int, spare: int) -> int:
    """Return how many rows each of `count` tensors has, so that together they have about the asked number of elements.

    Args:
        count: Of tensors.
        ranks: That shard the rows.
        spare: Rows beyond what the ranks divide.
    """
    even = _ELEMENTS // _COLUMNS // count // ranks * ranks
    return max(even, ranks) + spare % ranks


def _key(arguments: dict[str, Any], cpu_storage: str, *, ranks: int) -> str:
    """Return what a run is called: by what happens to its tensors, not by what it asked for."""
    is_even = arguments["rows"] % ranks == 0
    how = "copied" if cpu_storage == "copy" else "mapped" if is_even else "mapping allowed, exchanged"
    return f"{arguments['count']} tensors of {arguments['rows']} rows, {how}"


if __name__ == "__main__":
    main()
