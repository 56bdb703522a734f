"""One accelerator: what bringing up a model of Qwen3-8B's shape costs on four ranks, and how fast one rank loads it, beside other libraries.

    PYTHONPATH=src python benchmarks/gpu.py [--budget-seconds 600] [--directory DIR] [--json benchmarks/results/gpu.json]
    PYTHONPATH=src python benchmarks/gpu.py --device cpu --parameters 50000000     # the same code, as a rehearsal

It needs no network, and no package beyond torch, transformers, accelerate and safetensors. It writes a checkpoint of 16.4 GB in bf16, and
measures each row in processes of its own with a time limit, the most important rows first, until the budget is spent. The result is
written after each row. The ranks of a row share the first accelerator; what they tell each other goes over gloo, and no step is trained.

A row is "ok", "failed" with its error, or "not measured" with its reason: a library that is not installed, a mode that a plan says would not
fit into this machine, a budget that is spent, no accelerator. Host peaks are of anonymous memory, which pinned buffers are part of; device
peaks are of torch's allocator; both are increases. Inference libraries give full tensors, no model and no shards: on one rank these are as
many bytes. Leaves with status 1 if a row of shardwise failed, else 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

import gpu_checkpoint
from shardwise.compare.environment import describe_environment
from shardwise.planning import plan_job, predicted_for
from shardwise.profiling.whole_file import write_whole

_ROWS: Final = Path(__file__).with_name("gpu_rows.py")
_MEBIBYTE: Final = 2**20
_GRACE_SECONDS: Final = 20
_SPARE_BYTES: Final = 4 * 2**30
"""Of host and device memory, for libraries, contexts and whatever else runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Something that is measured.

    Args:
        name: In the table.
        limit_seconds: After which its processes are ended.
        request: For `gpu_rows.py`.
        is_own: Whether it is shardwise's.
    """

    name: str
    limit_seconds: int
    request: dict[str, Any]
    is_own: bool = False


def rows_of(*, ranks: int, repeats: int) -> list[Row]:
    """Return all rows, the most important first."""

    def mode(name: str, *, on: int, dtype: str = "auto", limit: int = 120) -> Row:
        own = name.startswith(("native", "accelerate-e"))
        label = f"{on} rank{'s' if on > 1 else ''}, {name}" + ("" if dtype == "auto" else f", {dtype}")
        request = {"kind": "mode", "mode": name, "ranks": on, "dtype": dtype}
        return Row(name=label, limit_seconds=limit, request=request, is_own=own)

    def load(name: str, *, cold: bool = False, limit: int = 60) -> Row:
        times = 1 if cold else repeats
        request = {"kind": "load", "loader": name, "cold": cold, "repeats": times}
        label = f"load, {'cold' if cold else 'warm'}: {name}"
        return Row(name=label, limit_seconds=limit, request=request, is_own=name.startswith("shardwise"))

    return [
        Row(
            name="floor: read into pinned memory",
            limit_seconds=60,
            request={"kind": "floor", "floor": "read"},
        ),
        Row(name="floor: copy to the device", limit_seconds=60, request={"kind": "floor", "floor": "copy"}),
        load("shardwise"),
        mode("native-efficient", on=ranks),
        mode("accelerate-efficient", on=ranks),
        mode("native-efficient", on=1),
        mode("transformers-distributed", on=1),
        load("safetensors load_file"),
        load("fastsafetensors"),
        load("runai-model-streamer"),
        load("InstantTensor"),
        mode("native-eager", on=ranks),
        mode("accelerate-eager", on=ranks),
        mode("accelerate-efficient", on=ranks, dtype="float32"),
        mode("native-efficient", on=ranks, dtype="float32"),
        mode("native-eager", on=ranks, dtype="float32"),
        mode("accelerate-eager", on=ranks, dtype="float32"),
        mode("transformers-distributed", on=ranks),
        mode("accelerate-stock", on=1),
        mode("set-model-state-dict", on=1, limit=90),
        mode("dcp-reader", on=1, limit=90),
        load("shardwise", cold=True),
        load("shardwise, direct_io", cold=True),
        mode("accelerate-stock", on=ranks),
        mode("set-model-state-dict", on=ranks),
        mode("dcp-reader", on=ranks),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = _options(arguments)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = options.device == "cpu"
    rows = [row for row in rows_of(ranks=options.ranks, repeats=options.repeats) if options.only in row.name]
    document: dict[str, Any] = {
        "benchmark": "gpu",
        "device": "cpu" if on_cpu else _name_of(accelerator),
        "environment": describe_environment(),
        "parameters": options.parameters,
        "seed": 0,
        "commit": _commit(),
        "rows": [],
    }
    if accelerator is None and not on_cpu:
        reason = "this machine has no accelerator"
        document["rows"] = [_left_out(row, reason) for row in rows]
        _finish(document, options.json)
        return 0
    ends = time.monotonic() + options.budget_seconds
    with contextlib.ExitStack() as stack:
        folder = options.directory or stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-"))
        Path(folder).mkdir(parents=True, exist_ok=True)
        model = Path(folder) / "model"
        needed = options.parameters * 2 - (0 if not model.exists() else options.parameters * 2)
        free = shutil.disk_usage(folder).free
        if needed > free:
            reason = f"{folder} has {free / 1e9:.1f} GB free, of {needed / 1e9:.1f} that the checkpoint takes"
            document["rows"] = [_left_out(row, reason) for row in rows]
            _finish(document, options.json)
            return 0
        if not model.exists():
            started = time.monotonic()
            try:
                _make_checkpoint(model, parameters=options.parameters)
            except Exception as error:  # of whatever kind: who started this has a result to read
                text = f"no checkpoint could be made: {type(error).__name__}: {error}"
                document["rows"] = [{**_entry(row), "status": "failed", "error": text} for row in rows]
                _finish(document, options.json)
                return 1
            document["generated_in_seconds"] = time.monotonic() - started
        for row in rows:
            left = ends - time.monotonic()
            if left < row.limit_seconds / 2:
                entry = _left_out(row, f"the budget of {options.budget_seconds:g} s was spent")
            elif reason := _does_not_fit(row, model, device="cpu" if on_cpu else "accelerator"):
                entry = _left_out(row, reason)
            else:
                entry = _measured(row, model, device=options.device, limit=min(row.limit_seconds, left))
            document["rows"].append(entry)
            print(_line(entry), flush=True)
            _write(document, options.json)
    _finish(document, options.json)
    return 1 if any(row["status"] == "failed" and row["is_own"] for row in document["rows"]) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("accelerator", "cpu"), default="accelerator")
    parser.add_argument("--parameters", type=int, default=gpu_checkpoint.QWEN3_8B_PARAMETERS)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="loads of each single-rank row, warm")
    parser.add_argument("--budget-seconds", type=float, default=540.0)
    parser.add_argument(
        "--directory", type=Path, help="where the checkpoint is kept; a temporary one if left out"
    )
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def _make_checkpoint(model: Path, *, parameters: int) -> None:
    """Write the checkpoint, whole or not at all: a later run takes it as it is."""
    partial = model.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    gpu_checkpoint.write_checkpoint(
        partial, parameters=parameters, files=4, threads=min(16, os.cpu_count() or 1)
    )
    partial.rename(model)


def _measured(row: Row, model: Path, *, device: str, limit: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gpu-row-") as folder:
        request, result = Path(folder) / "request.json", Path(folder) / "result.json"
        request.write_text(json.dumps({**row.request, "model": str(model), "device": device}))
        log = Path(folder) / "log"
        started = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, str(_ROWS), str(request), str(result)],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(timeout=limit)
                found = json.loads(result.read_text()) if result.exists() else None
                error = f"it left with status {process.returncode}. {_tail(log)}"
            except subprocess.TimeoutExpired:
                found, error = None, f"it took longer than {limit:.0f} s. {_tail(log)}"
            finally:
                _end(process)
        found = found if found is not None else {"status": "failed", "error": error}
        return {**_entry(row), **found, "row_seconds": time.monotonic() - started}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a row. Ranks are in sessions of their own: their launcher ends them when it is told to."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _does_not_fit(row: Row, model: Path, *, device: str) -> str | None:
    """Return why a mode would not fit into this machine by what a plan says of it; None where it does, or no plan is made of it."""
    if row.request["kind"] != "mode" or not row.is_own:
        return None
    ranks = row.request["ranks"]
    try:
        plan = plan_job(
            str(model),
            mesh_shape=(ranks,),
            dtype=row.request["dtype"],
            mixed_precision="no",
            device=device,
            ranks_per_node=ranks,
        )
        predicted = predicted_for(plan, row.request["mode"])
        there = {"host": _free_host_bytes(), "device": _free_device_bytes() if device != "cpu" else None}
    except Exception as error:  # then the row itself shows what happens
        print(f"{row.name}: no plan: {type(error).__name__}: {error}", flush=True)
        return None
    needed = {"host": ranks * predicted.host_peak_bytes, "device": ranks * predicted.device_peak_bytes}
    for kind, nbytes in needed.items():
        free = there[kind]
        if free is not None and nbytes + _SPARE_BYTES > free and nbytes > _SPARE_BYTES:
            return (
                f"a plan predicts {nbytes / 2**30:.0f} GiB of {kind} memory for {ranks} ranks, "
                f"of which this machine has {free / 2**30:.0f} free"
            )
    return None


def _free_host_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - _unevictable_bytes(group))
    return min(found)


def _unevictable_bytes(group: Path) -> int:
    counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(counts["anon"])


def _free_device_bytes() -> int:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return int(torch.get_device_module(accelerator).mem_get_info(0)[0])


def _entry(row: Row) -> dict[str, Any]:
    return {key: value for key, value in asdict(row).items() if key != "limit_seconds"}


def _left_out(row: Row, reason: str) -> dict[str, Any]:
    return {**_entry(row), "status": "not measured", "reason": reason}


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-8:])[-1500:]


def _name_of(accelerator: torch.device | None) -> str | None:
    if accelerator is None:
        return None
    properties = torch.get_device_module(accelerator).get_device_properties(0)
    return str(getattr(properties, "name", accelerator.type))


def _commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    return None


def _write(document: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        write_whole(path, json.dumps(document, indent=1) + "\n")


def share_of_floor(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return how near shardwise's reading into the device came to the slower of the two floors; None where one was not measured.

    Args:
        rows: Of the document.
    """
    found = {row["name"]: row for row in rows if row["status"] == "ok"}
    floors = [row for row in found.values() if row["request"]["kind"] == "floor"]
    load = found.get("load, warm: shardwise")
    if load is None or len(floors) < 2:
        return None
    rate: float = max(run["bytes"] / run["phases"]["read"] for run in load["runs"])
    slower: float = min(row["bytes"] / row["seconds"] for row in floors)
    return rate / slower


def _finish(document: dict[str, Any], path: Path | None) -> None:
    document["share_of_floor"] = share_of_floor(document["rows"])
    _write(document, path)
    print(f"device: {document['device'] or 'none'}; {document['parameters']:,} parameters, bf16 on disk")
    for entry in document["rows"]:
        print(_line(entry))
    if document["share_of_floor"] is not None:
        print(f"shardwise, reading into the device: {document['share_of_floor']:.0%} of the slower floor")


def _line(entry: dict[str, Any]) -> str:
    """Return a row as text: seconds, GB/s of one rank, peaks of the node's host memory and of the worst rank's device in MiB."""
    if entry["status"] != "ok":
        text = entry.get("reason") or entry.get("error", "")
        return f"{entry['name']:48} {entry['status']}: {text[:300]}"
    best = min(entry.get("runs", [entry]), key=lambda run: run["seconds"])
    cells = [f"{entry['seconds']:8.2f} s"]
    if "bytes" in best:
        cells.append(f"{best['bytes'] / best['seconds'] / 1e9:6.2f} GB/s")
    if "read" in best.get("phases", {}):
        cells.append(f"read {best['phases']['read']:.2f} s")
    host = entry.get("node_host_anon_peak_bytes", best.get("host_anon_peak_bytes"))
    peaks = [rank.get("device_peak_bytes") for rank in entry.get("ranks", [best])]
    device = max((peak for peak in peaks if peak is not None), default=None)
    cells += [f"host {host / _MEBIBYTE:,.0f}"] if host is not None else []
    cells += [f"device {device / _MEBIBYTE:,.0f}"] if device is not None else []
    return f"{entry['name']:48} {'  '.join(cells)}"


if __name__ == "__main__":
    sys.exit(main())
