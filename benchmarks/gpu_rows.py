"""What the rows of `gpu.py` measure, each in a process of its own: `python gpu_rows.py REQUEST RESULT`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import gpu_floors
import gpu_loaders
from shardwise.compare.worker import join_group_on_one_device, measure_mode
from shardwise.profiling import profile_memory
from shardwise.profiling.whole_file import write_whole


def device_of(name: str) -> torch.device:
    """Return the device that rows run on."""
    if name == "cpu":
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        raise RuntimeError("no accelerator")
    return torch.device(accelerator.type, 0)


def files_of(model: str) -> list[Path]:
    """Return the files of a checkpoint."""
    return sorted(Path(model).glob("*.safetensors"))


def measure_on_one_device(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Do what a rank of `shardwise compare` does, all ranks on the first device."""
    return measure_mode({**arguments, "one_device": True})


def mode(request: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the model up in a mode of `shardwise compare`, in ranks of its own."""
    from gpu_rows import measure_on_one_device as worker  # under the name by which ranks find it
    from shardwise.compare.experiment import compare
    from shardwise.compare.modes import modes_named

    with tempfile.TemporaryDirectory(prefix="gpu-rows-") as logs:
        comparison = compare(
            request["model"],
            ranks=request["ranks"],
            modes=modes_named([request["mode"]]),
            dtype=request["dtype"],
            log_directory=Path(logs),
            progress=lambda text: print(text, flush=True),
            load_only=True,
            worker=worker,
        )
    (run,) = comparison.document["runs"]
    if run["status"] != "ok":
        return {"status": "failed", "error": run["error"]}
    return {
        "seconds": run["seconds"],
        "phases": run["phases"],
        "route": run["route"],
        "storage_bytes": run["storage_bytes"],
        "network_bytes": run["network_bytes"],
        "dtypes": run["dtypes"],
        "node_host_anon_peak_bytes": run["node"]["host_anon_peak_bytes"],
        "node_host_pss_peak_bytes": run["node"]["host_pss_peak_bytes"],
        "ranks": [
            {
                key: rank[key]
                for key in ("rank", "host_anon_peak_bytes", "device_peak_bytes", "shard_bytes", "seconds")
            }
            for rank in run["ranks"]
        ],
    }


def load(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load on one rank, several times: the first load of a process pays for what later ones find."""
    import torch.distributed as dist

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    device = device_of(request["device"])
    if request["device"] == "cpu":
        dist.init_process_group("gloo")
    else:
        join_group_on_one_device()
    loader = gpu_loaders.LOADERS[request["loader"]](request["model"], device)
    runs = []
    for _ in range(request["repeats"]):
        if request["cold"]:
            drop_from_cache(files_of(request["model"]))
        with profile_memory(device=device) as profile:
            started = time.perf_counter()
            held, more = loader()
            _synchronize(device)
            seconds = time.perf_counter() - started
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
        runs.append(
            {
                "seconds": seconds,
                "bytes": nbytes,
                "host_anon_peak_bytes": profile.anon_peak_bytes,
                "device_peak_bytes": profile.peak_between(0.0, profile.seconds).device_peak_bytes,
                **more,
            }
        )
        del held
        if device.type != "cpu":
            torch.accelerator.empty_cache()
    dist.destroy_process_group()
    return {"seconds": min(run["seconds"] for run in runs), "runs": runs}


def floor(request: Mapping[str, Any]) -> dict[str, Any]:
    """Measure a floor."""
    device, files = device_of(request["device"]), files_of(request["model"])
    if request["floor"] == "copy":
        return gpu_floors.copy_floor(sum(path.stat().st_size for path in files), device)
    return gpu_floors.read_floor(files, device)


def drop_from_cache(files: list[Path]) -> None:
    """Let the kernel forget the files' pages; these must be on the disk before."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


KINDS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"mode": mode, "load": load, "floor": floor}


def main() -> None:
    """Measure one row, and write what came out; an error is a result too."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        result = {"status": "ok", **KINDS[request["kind"]](request)}
    except gpu_loaders.NotInstalledError as error:
        result = {"status": "not measured", "reason": str(error)}
    except Exception as error:
        result = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
    write_whole(sys.argv[2], json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)  # whatever threads other libraries have left


if __name__ == "__main__":
    main()
