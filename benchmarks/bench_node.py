"""Memory of a node as ranks are added, bytes requested by replicas, and what a plan predicts of both.

    python benchmarks/bench_node.py [--parameters N] [--kind dense --kind tied --kind moe] [--part node] [--part meshes]

*node*: 2, 4 and 8 ranks of one node load and wrap a generated checkpoint in bf16, with shards in memory of their own and with shards
that are pages of the file. A node's peak is the sum of its ranks' peaks of anonymous host memory over load and wrap. It is flat if it
grows by at most 5 % and one staging buffer (64 MiB) for each rank that is added.

*meshes*: 1, 2 and 4 ranks, and 2 x 2 replicas and shards: bytes that all ranks together request, against the checkpoint's size; and the
largest growth of one rank over the wrap, against what `plan_load` says from the headers.

`dense` has a head of its own, `tied` shares it with the embedding, `moe` has 64 experts with matrices of their own on disk.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

import node_workers
from harness import write_figures
from shardwise import plan_load
from shardwise.compare.generated import generate_checkpoint
from shardwise.compare.launch import run_ranks

_MEBIBYTE = 2**20
_STAGING_BYTES = 64 * _MEBIBYTE
_INDEX = "model.safetensors.index.json"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=1_000_000_000)
    parser.add_argument("--kind", action="append", choices=("dense", "tied", "moe"))
    parser.add_argument("--part", action="append", choices=("node", "meshes"))
    parser.add_argument("--ranks", type=int, action="append", help="of the node (default 2, 4 and 8)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    parts = options.part or ["node", "meshes"]
    figures: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
    for kind in options.kind or ["dense", "tied", "moe"]:
        with tempfile.TemporaryDirectory(prefix="bench-node-") as folder:
            console.print(f"writing a {kind} checkpoint of about {options.parameters:,} parameters")
            model = checkpoint_of_kind(kind, options.parameters, Path(folder))
            if "node" in parts:
                for ranks in options.ranks or [2, 4, 8]:
                    for cpu_storage in ("copy", "map"):
                        figures["node"].append(_run(kind, model, (ranks,), cpu_storage, console))
            if "meshes" in parts:
                for shape in ((1,), (2,), (4,), (2, 2)):
                    figures["meshes"].append(_planned(_run(kind, model, shape, "copy", console), model))
    if "node" in parts:
        _print_node(figures["node"], console)
    if "meshes" in parts:
        _print_meshes(figures["meshes"], console)
    floor = "the ranks' shards, `shards_bytes`, where they are copied; nothing where they are mapped"
    write_figures(options.json, "node", options, floor=floor, **figures)


def checkpoint_of_kind(kind: str, parameters: int, folder: Path) -> Path:
    """Write a checkpoint in `folder` and return its directory: `dense`, `tied` or `moe`, as above."""
    directory = folder / "model"
    generate_checkpoint(
        directory,
        config_kind="moe" if kind == "moe" else "dense",
        parameters=parameters,
        dtype=torch.bfloat16,
        seed=0,
        files=4,
    )
    if kind == "dense":
        _untie(directory)
    return directory


def _untie(directory: Path) -> None:
    """Give a generated model, whose embedding is its head too, a head of its own."""
    config = json.loads((directory / "config.json").read_text())
    index = json.loads((directory / _INDEX).read_text())
    head = torch.randn(config["vocab_size"], config["hidden_size"]).to(torch.bfloat16)
    save_file({"lm_head.weight": head}, directory / "head.safetensors", metadata={"format": "pt"})
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    (directory / _INDEX).write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


def _run(kind: str, model: Path, shape: Sequence[int], cpu_storage: str, console: Console) -> dict[str, Any]:
    console.print(f"{kind}, ranks {' x '.join(map(str, shape))}, cpu_storage={cpu_storage!r}")
    logs = model.parent / "logs"
    by_rank = run_ranks(
        node_workers.measure,
        {"model": str(model), "shape": list(shape), "cpu_storage": cpu_storage},
        ranks=math.prod(shape),
        log_directory=logs,
        progress=lambda _text: None,
    )
    shutil.rmtree(logs, ignore_errors=True)
    first = by_rank[0]
    return {
        "kind": kind,
        "shape": list(shape),
        "cpu_storage": cpu_storage,
        "checkpoint_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "node_peak_bytes": sum(result["peak_bytes"] for result in by_rank.values()),
        "rank_peak_bytes": max(result["peak_bytes"] for result in by_rank.values()),
        "wrap_peak_bytes": max(result["wrap_peak_bytes"] for result in by_rank.values()),
        "shard_bytes": max(result["shard_bytes"] for result in by_rank.values()),
        "shards_bytes": sum(result["shard_bytes"] for result in by_rank.values()),
        "requested_bytes": first["requested_bytes"],
        "network_bytes": first["network_bytes"],
        "route": first["route"],
        "seconds": max(result["seconds"] for result in by_rank.values()),
    }


def _planned(run: dict[str, Any], model: Path) -> dict[str, Any]:
    shape = tuple(run["shape"])
    plan = plan_load(
        str(model), mesh_shape=shape, device="cpu", ranks_per_node=math.prod(shape), cpu_storage="copy"
    )
    return {
        **run,
        "planned_peak_bytes": plan.host_peak_bytes,
        "planned_requested_bytes": plan.storage_bytes,
        "planned_route": plan.route,
    }


def _print_node(runs: list[dict[str, Any]], console: Console) -> None:
    table = Table(
        "model",
        "shards",
        "ranks",
        "node's peak, MiB",
        "all shards, MiB",
        "bound, MiB",
        "worst rank, MiB",
        "flat",
    )
    of_few: dict[tuple[str, str], dict[str, Any]] = {}
    for run in sorted(runs, key=lambda each: (each["kind"], each["cpu_storage"], each["shape"])):
        few = of_few.setdefault((run["kind"], run["cpu_storage"]), run)
        added = run["shape"][0] - few["shape"][0]
        bound = 1.05 * few["node_peak_bytes"] + added * _STAGING_BYTES
        run["flat"] = run["node_peak_bytes"] <= bound
        table.add_row(
            run["kind"],
            "copied" if run["cpu_storage"] == "copy" else "mapped",
            str(run["shape"][0]),
            _mebibytes(run["node_peak_bytes"]),
            _mebibytes(run["shards_bytes"]),
            _mebibytes(bound),
            _mebibytes(run["rank_peak_bytes"]),
            str(run["flat"]),
        )
    console.print(table)


def _print_meshes(runs: list[dict[str, Any]], console: Console) -> None:
    table = Table(
        "model",
        "mesh",
        "route",
        "requested / checkpoint",
        "as planned",
        "peak, MiB",
        "planned, MiB",
        "off by",
    )
    for run in runs:
        run["peak_off_by"] = run["planned_peak_bytes"] / run["wrap_peak_bytes"] - 1
        table.add_row(
            run["kind"],
            " x ".join(map(str, run["shape"])),
            run["route"],
            f"{run['requested_bytes'] / run['checkpoint_bytes']:.4f}",
            str(run["planned_requested_bytes"] == run["requested_bytes"]),
            _mebibytes(run["wrap_peak_bytes"]),
            _mebibytes(run["planned_peak_bytes"]),
            f"{run['peak_off_by']:+.1%}",
        )
    console.print(table)


def _mebibytes(nbytes: float) -> str:
    return f"{nbytes / _MEBIBYTE:,.0f}"


if __name__ == "__main__":
    main()
