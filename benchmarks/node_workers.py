"""What one rank does in `bench_node.py`: load and wrap over a mesh, and report bytes and memory."""

from __future__ import annotations

import ctypes
import datetime
import gc
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from shardwise import NativeFSDPStrategy, profile_memory

_AXES = ("dp_replicate", "dp_shard")


def measure(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a model up; return what was requested, and by how much this rank's anonymous memory grew at most.

    Args:
        arguments: `model` (a directory), `shape` (of the mesh) and `cpu_storage`.
    """
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM._model_mapping  # noqa: B018  the imports are not what is measured

    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=20))
    shape = tuple(arguments["shape"])
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=_AXES[-len(shape) :])
    dist.barrier()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the imports freed must not serve the load unseen
    with profile_memory() as profile:
        strategy = NativeFSDPStrategy(mesh, mixed_precision="no", cpu_storage=arguments["cpu_storage"])
        model = strategy.load_pretrained(AutoModelForCausalLM, arguments["model"])
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        model = strategy.wrap_model(model)
    report = strategy.last_report
    assert report is not None
    own = next(each for each in report.ranks if each.rank == dist.get_rank())
    result = {
        "peak_bytes": profile.anon_peak_bytes,
        "wrap_peak_bytes": own.host_anon_peak_bytes,
        "shard_bytes": own.shard_bytes,
        "requested_bytes": report.storage_bytes,
        "network_bytes": report.network_bytes,
        "route": report.route,
        "seconds": report.seconds,
    }
    dist.barrier()
    dist.destroy_process_group()
    return result
