"""Time and memory as the work grows: 0.25 to 2 B parameters on 1 to 8 ranks.

    python benchmarks/bench_growth.py --json FILE [--resume] [--folder DIR] [--most-seconds N] [--plot PNG]

Dense checkpoints in bf16 are generated, in `--folder` if it is given, which keeps them for the next run. Model sizes and numbers of ranks are taken
one by one, in fresh processes each; these bring the model up three times, mapped and copied, and build it without values, which is the
floor. With `--resume` what the file has already is not measured again; `--most-seconds` begins nothing new after that time.

Taken are medians: seconds until all is resident (every page of every shard touched), processor seconds of a rank, and the growth of a rank's
anonymous memory, copied shards left out. A straight line through the sizes is fitted for each number of ranks: seconds are linear in a
rank's bytes if the residuals are small. On fewer processors than ranks the ranks take turns, so that seconds grow with their number; processor
seconds tell what each costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import growth_workers
from harness import SEED, write_figures
from shardwise.compare.environment import usable_cpus
from shardwise.compare.generated import generate_checkpoint
from shardwise.compare.launch import run_ranks

_PARAMETERS = (250_000_000, 500_000_000, 1_000_000_000, 2_000_000_000)
_RANKS = (1, 2, 4, 8)
_MAPPED, _COPIED = "shardwise, mapped", "shardwise, copied"
_WAYS = ("floor", _MAPPED, _COPIED)
_FLOOR = "`floor`: the model built on meta and sharded, without values"
_MEBIBYTE = 2**20
Row = dict[str, Any]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, action="append")
    parser.add_argument("--ranks", type=int, action="append")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept; default: a temporary one")
    parser.add_argument("--most-seconds", type=float, default=float("inf"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=160)
    rows: list[Row] = []
    if options.resume and options.json is not None and options.json.exists():
        rows = json.loads(options.json.read_text())["rows"]
    done = {(row["parameters"], row["ranks"]) for row in rows}
    began, stopped = time.monotonic(), False
    for parameters in options.parameters or _PARAMETERS:
        missing = [ranks for ranks in options.ranks or _RANKS if (parameters, ranks) not in done]
        if not missing:
            continue
        with tempfile.TemporaryDirectory(prefix="bench-growth-") as temporary:
            folder = options.folder or Path(temporary)
            model = folder / str(parameters)
            if not model.exists():
                console.print(f"writing a checkpoint of about {parameters:,} parameters")
                generate_checkpoint(
                    model,
                    config_kind="dense",
                    parameters=parameters,
                    dtype=torch.bfloat16,
                    seed=SEED,
                    files=4,
                )
            for ranks in missing:
                stopped = time.monotonic() - began > options.most_seconds
                if stopped:
                    break
                console.print(f"{parameters:,} parameters on {ranks} ranks")
                rows += _run(model, parameters, ranks, options.repeats, Path(temporary))
                _write(options, rows)
        if stopped:
            console.print("stopped: run again with --resume for the rest")
            break
    _print(rows, console)
    if options.plot is not None:
        _plot(rows, options.plot)


def _run(model: Path, parameters: int, ranks: int, repeats: int, folder: Path) -> list[Row]:
    by_rank = run_ranks(
        growth_workers.measure,
        {"model": str(model), "ways": _WAYS, "repeats": repeats},
        ranks=ranks,
        log_directory=folder / f"logs-{ranks}",
        progress=lambda _text: None,
    )
    rows = []
    for way in _WAYS:
        of_ranks = [result[way] for result in by_rank.values()]
        shard = max(run["shard_bytes"] for runs in of_ranks for run in runs)
        peaks = [statistics.median(run["peak_bytes"] for run in runs) for runs in of_ranks]
        rows.append(
            {
                "parameters": parameters,
                "ranks": ranks,
                "way": way,
                "shard_bytes": shard,
                "ready_seconds": _median(of_ranks, "ready_seconds"),
                "resident_seconds": _median(of_ranks, "resident_seconds"),
                "rank_cpu_seconds": _median(of_ranks, "cpu_seconds"),
                "rank_peak_bytes": max(peaks),
                "node_peak_bytes": sum(peaks),
                "beside_shard_bytes": max(peaks) - (shard if way == _COPIED else 0),
                "all_resident_seconds": [
                    max(runs[i]["resident_seconds"] for runs in of_ranks) for i in range(repeats)
                ],
            }
        )
    return rows


def _median(of_ranks: list[list[Row]], key: str) -> float:
    """Return the median over the repeats of the slowest rank's figure."""
    return statistics.median(
        max(values) for values in zip(*([r[key] for r in runs] for runs in of_ranks), strict=True)
    )


def _fits(rows: list[Row]) -> list[Row]:
    """Return, for each way and number of ranks, the line through the sizes and what is left over."""
    fits = []
    for way in _WAYS[1:]:
        for ranks in sorted({row["ranks"] for row in rows}):
            of_line = [row for row in rows if (row["way"], row["ranks"]) == (way, ranks)]
            if len(of_line) < 3:
                continue
            gigabytes = np.array([row["shard_bytes"] for row in of_line]) / 1e9
            for key in ("resident_seconds", "rank_cpu_seconds"):
                seconds = np.array([row[key] for row in of_line])
                slope, start = np.polyfit(gigabytes, seconds, 1)
                left = seconds - (start + slope * gigabytes)
                spread = float(((seconds - seconds.mean()) ** 2).sum())
                fits.append(
                    {
                        "way": way,
                        "ranks": ranks,
                        "of": key,
                        "seconds_at_0": float(start),
                        "seconds_per_gigabyte": float(slope),
                        "largest_residual_seconds": float(abs(left).max()),
                        "r_squared": 1 - float((left**2).sum()) / spread if spread else 1.0,
                    }
                )
    return fits


def _write(options: argparse.Namespace, rows: list[Row]) -> None:
    write_figures(options.json, "growth", options, floor=_FLOOR, rows=rows, fits=_fits(rows))


def _print(rows: list[Row], console: Console) -> None:
    table = Table(
        *("parameters", "ranks", "way", "shard, MiB", "ready, s", "resident, s", "rank's CPU, s"),
        *("rank's peak, MiB", "beside its shard", "node's peak"),
    )
    for row in sorted(rows, key=lambda each: (each["way"], each["ranks"], each["parameters"])):
        table.add_row(
            f"{row['parameters']:,}",
            str(row["ranks"]),
            row["way"],
            f"{row['shard_bytes'] / _MEBIBYTE:,.0f}",
            f"{row['ready_seconds']:.2f}",
            f"{row['resident_seconds']:.2f}" if row["way"] != "floor" else "",
            f"{row['rank_cpu_seconds']:.2f}",
            f"{row['rank_peak_bytes'] / _MEBIBYTE:,.0f}",
            f"{row['beside_shard_bytes'] / _MEBIBYTE:,.0f}",
            f"{row['node_peak_bytes'] / _MEBIBYTE:,.0f}",
        )
    console.print(table)
    for fit in _fits(rows):
        console.print(
            f"{fit['way']}, {fit['ranks']} ranks, {fit['of']}: {fit['seconds_at_0']:.2f} s + {fit['seconds_per_gigabyte']:.2f} s "
            f"per GB of a shard; largest residual {fit['largest_residual_seconds']:.2f} s, R² {fit['r_squared']:.3f}",
            soft_wrap=True,
        )


def _plot(rows: list[Row], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for column, way in enumerate(_WAYS[1:]):
        for ranks in sorted({row["ranks"] for row in rows}):
            of_line = sorted(
                (row for row in rows if (row["way"], row["ranks"]) == (way, ranks)),
                key=lambda each: each["shard_bytes"],
            )
            gigabytes = [row["shard_bytes"] / 1e9 for row in of_line]
            label = f"{ranks} rank{'s' if ranks > 1 else ''}"
            axes[0][column].plot(
                gigabytes, [row["resident_seconds"] for row in of_line], marker="o", label=label
            )
            axes[1][column].plot(
                gigabytes, [row["beside_shard_bytes"] / _MEBIBYTE for row in of_line], marker="o", label=label
            )
        axes[0][column].set(title=way, ylim=(0, None))
        axes[1][column].set(xlabel="a rank's shard, GB", ylim=(0, 160))
    axes[0][0].set_ylabel(f"seconds until resident ({usable_cpus()} processors)")
    axes[1][0].set_ylabel("rank's peak beside its shard, MiB")
    axes[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
