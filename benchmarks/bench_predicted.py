"""What `shardwise plan` predicts beside what is measured: every mode of `shardwise compare` that is shardwise's own, on 1, 2 and 4 ranks and 2 x 2.

    python benchmarks/bench_predicted.py [--parameters N] [--kind dense --kind tied --kind moe] [--mode NAME] [--dtype float32]

Generated checkpoints in bf16: `dense` has a head of its own, `tied` shares it with the embedding, `moe` has 64 experts with matrices of
their own on disk. Each run is in fresh processes. *storage* is what the ranks' reports say that shardwise requested, together; the host
peak is the growth of anonymous memory of the rank with the most, over load, optimizer and wrap. A prediction holds if storage bytes are equal,
and the host peak is within 10 % of the measured one or 64 MiB. Leaves with status 1 if one does not.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench_node import checkpoint_of_kind
from harness import write_figures
from shardwise.compare.launch import run_ranks
from shardwise.compare.modes import MODES
from shardwise.compare.worker import measure_mode
from shardwise.planning import JobPlan, plan_job, predicted_for

_MEBIBYTE = 2**20
_MODES = tuple(name for name, mode in MODES.items() if mode.strategy != "peer")
_SHAPES = ((1,), (2,), (4,), (2, 2))
_MOST_OFF = 0.10
_MOST_OFF_BYTES = 64 * _MEBIBYTE


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=500_000_000)
    parser.add_argument("--kind", action="append", choices=("dense", "tied", "moe"))
    parser.add_argument("--mode", action="append", choices=_MODES)
    parser.add_argument("--dtype", choices=("auto", "float32"), default="auto", help="of the shards")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console.width = 140
    runs: list[dict[str, Any]] = []
    for kind in options.kind or ["dense", "tied", "moe"]:
        with tempfile.TemporaryDirectory(prefix="bench-predicted-") as folder:
            console.print(f"writing a {kind} checkpoint of about {options.parameters:,} parameters")
            model = checkpoint_of_kind(kind, options.parameters, Path(folder))
            for shape in _SHAPES:
                plan = plan_job(
                    str(model),
                    mesh_shape=shape,
                    dtype=options.dtype,
                    mixed_precision="no",
                    device="cpu",
                    ranks_per_node=math.prod(shape),
                )
                for mode in options.mode or _MODES:
                    console.print(f"{kind}, ranks {' x '.join(map(str, shape))}, {mode}")
                    runs.append(_run(kind, model, shape, mode, options.dtype, plan))
    _print(runs, console)
    write_figures(
        options.json, "predicted", options, floor="what was measured, beside each prediction", runs=runs
    )
    return 0 if all(run["holds"] for run in runs) else 1


def _run(
    kind: str, model: Path, shape: tuple[int, ...], mode: str, dtype: str, plan: JobPlan
) -> dict[str, Any]:
    logs = model.parent / "logs"
    by_rank = run_ranks(
        measure_mode,
        {
            "model": str(model),
            "mode": mode,
            "dtype": dtype,
            "load_only": True,
            "ask": False,
            "mesh_shape": list(shape),
        },
        ranks=math.prod(shape),
        log_directory=logs,
        progress=lambda _text: None,
    )
    shutil.rmtree(logs, ignore_errors=True)
    predicted = predicted_for(plan, mode)
    measured = max(result["peaks"]["host_anon_peak_bytes"] for result in by_rank.values())
    storage = by_rank[0]["report"]["storage_bytes"]
    off_bytes = predicted.host_peak_bytes - measured
    return {
        "kind": kind,
        "shape": list(shape),
        "mode": mode,
        "route": by_rank[0]["report"]["route"],
        "storage_bytes": storage,
        "predicted_storage_bytes": predicted.storage_bytes,
        "host_peak_bytes": measured,
        "predicted_host_peak_bytes": predicted.host_peak_bytes,
        "holds": storage == predicted.storage_bytes
        and abs(off_bytes) <= max(_MOST_OFF * measured, _MOST_OFF_BYTES),
    }


def _print(runs: list[dict[str, Any]], console: Console) -> None:
    table = Table(
        "model", "mesh", "mode", "route", "storage, MiB", "predicted", "host peak, MiB", "predicted", "holds"
    )
    for run in runs:
        exact = run["storage_bytes"] == run["predicted_storage_bytes"]
        table.add_row(
            run["kind"],
            " x ".join(map(str, run["shape"])),
            run["mode"],
            run["route"],
            _mebibytes(run["storage_bytes"]),
            "equal" if exact else _mebibytes(run["predicted_storage_bytes"]),
            _mebibytes(run["host_peak_bytes"]),
            _mebibytes(run["predicted_host_peak_bytes"]),
            "yes" if run["holds"] else "NO",
        )
    console.print(table)


def _mebibytes(nbytes: float) -> str:
    return f"{nbytes / _MEBIBYTE:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
