"""Planning for many ranks without a cluster: seconds and peak memory of `plan_load`, and what it says.

    python benchmarks/bench_plan.py [--ranks 512 1024 4096 16384] [--route auto striped] [--json FILE]

DeepSeek-V3's shape, 671 B parameters: once from its config, once from the headers of a generated checkpoint of 163 files
that hold 91 k tensors and no values (bf16 weights, and the scales of its fp8 form, which nothing takes). Every plan is
made in a fresh process; importing is not part of its seconds. The floor is taken before it there: headers read and parsed, or the model of
the config built on meta, and nothing planned. Needs transformers 5.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness import write_figures
from shardwise.report.units import format_bytes

_FILES = 163
_BLOCK = 128  # elements of a scale's block, along each dim


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[512, 1024, 4096, 16384])
    parser.add_argument("--route", nargs="+", default=["auto", "striped"])
    parser.add_argument("--mesh", type=int, nargs=2, action="append", default=[], help="replicas and shards")
    parser.add_argument("--source", nargs="+", choices=("config", "headers"), default=["config", "headers"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as folder:
        if "headers" in options.source:
            tensors = write_headers(Path(folder))
            console.print(f"headers of {tensors:,} tensors in {_FILES} files")
        meshes = [*((ranks,) for ranks in options.ranks), *map(tuple, options.mesh)]
        for source in options.source:
            for mesh in meshes:
                for route in options.route:
                    run = _in_fresh_process(folder if source == "headers" else None, mesh, route)
                    runs.append({"source": source, **run})
                    console.print(
                        f"{source}, {mesh}, {route}: {run['seconds']:.1f} s ({run['cpu_seconds']:.1f} s of a processor), {format_bytes(run['peak_bytes'], unit='MiB')}"
                    )
    table = Table(
        "from",
        "mesh",
        "route",
        "floor, s",
        "seconds",
        "peak memory",
        "storage",
        "network",
        "reads",
        "mean read",
        "shard",
        "one rank receives",
    )
    for run in runs:
        plan = run["plan"]
        table.add_row(
            run["source"],
            "x".join(map(str, run["mesh"])),
            plan["route"],
            f"{run['floor_seconds']:.1f}",
            f"{run['seconds']:.1f}",
            format_bytes(run["peak_bytes"], unit="MiB"),
            format_bytes(plan["storage_bytes"], unit=None),
            format_bytes(plan["network_bytes"], unit=None),
            f"{plan['reads']:,}",
            format_bytes(plan["mean_read_bytes"], unit="MiB"),
            format_bytes(plan["shard_bytes"], unit=None),
            format_bytes(plan["rank_network_bytes"], unit=None),
        )
    console.print(table)
    floor = "`floor_seconds`: the headers read and parsed, or of a config the model built on meta, and nothing planned"
    write_figures(options.json, "plan", options, floor=floor, runs=runs)


def write_headers(directory: Path) -> int:
    """Write the headers of DeepSeek-V3's checkpoint into files without values; return the number of tensors."""
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV3Config
    from transformers.initialization import meta_device_safe_creation_ops

    from shardwise.planning.estimate import estimated_source

    config = DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], dtype="bfloat16")
    config.save_pretrained(directory)
    with torch.device("meta"), meta_device_safe_creation_ops():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    entries: list[tuple[str, str, list[int], int]] = []
    for stored in estimated_source(model, name="DeepSeek-V3").tensors.values():
        code = {2: "BF16", 4: "F32"}[stored.dtype.itemsize]
        entries.append((stored.name, code, list(stored.shape), stored.nbytes))
        if stored.name.endswith("proj.weight"):
            blocks = [-(-size // _BLOCK) for size in stored.shape]
            nbytes = 4 * blocks[0] * blocks[1]
            entries.append((f"{stored.name}_scale_inv", "F32", blocks, nbytes))
    names: dict[str, str] = {}
    per_file = -(-sum(entry[3] for entry in entries) // _FILES)
    files: list[list[tuple[str, str, list[int], int]]] = [[] for _ in range(_FILES)]
    before = 0
    for entry in entries:
        files[before // per_file].append(entry)
        before += entry[3]
    for number, of_file in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{_FILES:06d}.safetensors"
        header: dict[str, Any] = {}
        start = 0
        for tensor, code, shape, nbytes in sorted(of_file, key=lambda e: (e[1] == "BF16", e[0])):
            header[tensor] = {"dtype": code, "shape": shape, "data_offsets": [start, start + nbytes]}
            names[tensor] = name
            start += nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + start)  # sparse: no values
    index = {"metadata": {}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return len(names)


def _in_fresh_process(directory: str | None, mesh: tuple[int, ...], route: str) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_plan, (directory, mesh, route))


def _plan(directory: str | None, mesh: tuple[int, ...], route: str) -> dict[str, Any]:
    import transformers.models.deepseek_v3.modeling_deepseek_v3  # noqa: F401  # not part of planning
    from transformers import DeepseekV3Config

    import shardwise

    plan_load = shardwise.plan_load
    floor_started = time.perf_counter()
    _floor(directory)
    floor_seconds = time.perf_counter() - floor_started
    started, cpu_started = time.perf_counter(), time.process_time()
    plan = plan_load(directory or DeepseekV3Config(), mesh_shape=mesh, route=route, dtype="bfloat16")
    return {
        "mesh": mesh,
        "floor_seconds": floor_seconds,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "plan": {**plan.to_json(), "model": "DeepSeek-V3's shape"},
    }


def _floor(directory: str | None) -> None:
    if directory is not None:
        from shardwise.checkpoint import SafetensorsSource

        SafetensorsSource.open(Path(directory))
        return
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV3Config
    from transformers.initialization import meta_device_safe_creation_ops

    with torch.device("meta"), meta_device_safe_creation_ops():
        AutoModelForCausalLM.from_config(DeepseekV3Config(), dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
