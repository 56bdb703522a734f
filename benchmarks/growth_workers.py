"""What one rank does in `bench_growth.py`: bring a model up again and again, mapped and copied, and take its time and memory."""

from __future__ import annotations

import ctypes
import datetime
import gc
import time
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from direct_workers import WAYS, local_bytes, touch
from shardwise import profile_memory


def measure(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a list of runs for each way; the processes are the same for all.

    Args:
        arguments: `model` (a directory), `ways` (keys of `direct_workers.WAYS`) and `repeats`.
    """
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM._model_mapping  # noqa: B018  the imports are not what is measured

    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=20))
    for way in ("floor", "shardwise, mapped"):
        _measure(way, arguments["model"])  # the first load imports modules, and more
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in arguments["ways"]}
    for _ in range(arguments["repeats"]):
        for way, of_way in runs.items():
            of_way.append(_measure(way, arguments["model"]))
    dist.barrier()
    dist.destroy_process_group()
    return runs


def _measure(way: str, directory: str) -> dict[str, Any]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier run freed must not serve this one unseen
    dist.barrier()
    cpu = time.process_time()
    with profile_memory() as profile:
        started = time.perf_counter()
        model, _ = WAYS[way](directory, "auto")
        dist.barrier()
        ready = time.perf_counter() - started
    if way != "floor":
        touch(model)
    dist.barrier()
    return {
        "ready_seconds": ready,
        "resident_seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": profile.anon_peak_bytes,
        "shard_bytes": local_bytes(model),
    }
