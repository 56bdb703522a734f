"""What one rank does in `bench_rank0.py`: bring a model into shards that rank 0 alone loads or reads."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shardwise import NativeFSDPStrategy, profile_memory
from shardwise.checkpoint import SafetensorsSource


def measure(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Load on rank 0, shard, and fill the shards of all ranks; return seconds of the two parts and host memory.

    Args:
        arguments: `model` (a directory), `dtype` (torch's name of it) and `way` (a key of `WAYS`).
    """
    from transformers import AutoModelForCausalLM

    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=20))
    if arguments["way"] in FLOORS:
        return _send_bytes(
            arguments["model"],
            getattr(torch, arguments["dtype"]),
            from_files=arguments["way"] == READ_AND_SENT,
        )
    init_device_mesh("cpu", (dist.get_world_size(),))
    from_files = arguments["way"] == FROM_FILES
    strategy = NativeFSDPStrategy(mixed_precision="no", route="rank0" if from_files else "auto")
    dtype = getattr(torch, arguments["dtype"])
    dist.barrier()
    with profile_memory() as profile:
        with profile.phase("load"):
            model = strategy.load_pretrained(
                AutoModelForCausalLM, arguments["model"], dtype=dtype, defer=from_files
            )
            dist.barrier()
        with profile.phase("transfer"):
            fill = WAYS[arguments["way"]]
            if fill is not None:
                fill(strategy, model)
            dist.barrier()
    seconds = profile.phase_seconds()
    checksum = sum(parameter.to_local().double().sum().item() for parameter in model.parameters())
    total = torch.tensor([checksum], dtype=torch.float64)
    dist.all_reduce(total)
    dist.destroy_process_group()
    return {
        "host_anon_peak_bytes": profile.anon_peak_bytes,
        "seconds": seconds["transfer"],
        "load_seconds": seconds["load"],
        "checksum": total.item(),
    }


def _shardwise(strategy: NativeFSDPStrategy, model: nn.Module) -> None:
    strategy.wrap_model(model)


def _set_model_state_dict(strategy: NativeFSDPStrategy, model: nn.Module) -> None:
    """Shard on meta, then let torch broadcast each full tensor from rank 0, of which every rank keeps its part."""
    full: dict[str, Any] = {}
    if dist.get_rank() == 0:
        full = dict(model.state_dict())
        model.to("meta")
        model.tie_weights()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in full}
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, full, options=options)
    del buffers


def _send_bytes(directory: str, dtype: torch.dtype, *, from_files: bool) -> dict[str, Any]:
    """Send each rank as many bytes as its shards have, and do nothing else with them.

    Args:
        directory: Of the checkpoint.
        dtype: Of the shards.
        from_files: Whether rank 0 reads them and the others receive them in fresh memory, as shards are; else they are sent from one
            buffer of rank 0's into one of each other's.
    """
    source = SafetensorsSource.open(Path(directory))
    values = sum(each.nbytes // each.dtype.itemsize for each in source.tensors.values())
    ranks, rank = dist.get_world_size(), dist.get_rank()
    total = values * dtype.itemsize // ranks
    files = (path.open("rb") for path in sorted(Path(directory).glob("*.safetensors")))
    buffers = [torch.zeros(_BUCKET_BYTES, dtype=torch.uint8) for _ in range(ranks)]
    dist.barrier()
    started = time.perf_counter()
    received = torch.empty(total if from_files and rank else 0, dtype=torch.uint8)
    file = next(files)
    for start in range(0, total, _BUCKET_BYTES):
        nbytes = min(total - start, _BUCKET_BYTES)
        if rank != 0:
            dist.recv(received[start : start + nbytes] if from_files else buffers[0][:nbytes], 0)
            continue
        sending = []
        for other in range(1, ranks):
            bucket = buffers[other if from_files else 0][:nbytes]
            if from_files and file.readinto(memoryview(bucket.numpy())) < nbytes:
                file.seek(0)  # stored bytes of another dtype than the shards' are fewer
                file = next(files, file)
            sending.append(dist.isend(bucket, other))
        for work in sending:
            work.wait()
    dist.barrier()
    seconds = time.perf_counter() - started
    dist.destroy_process_group()
    peak_bytes = (ranks * _BUCKET_BYTES if rank == 0 else total) if from_files else _BUCKET_BYTES
    return {"host_anon_peak_bytes": peak_bytes, "seconds": seconds, "load_seconds": 0.0, "checksum": None}


SENT = "floor: as many bytes sent"
READ_AND_SENT = "floor: read, sent, into fresh memory"
FLOORS = (SENT, READ_AND_SENT)
_BUCKET_BYTES = 8 * 2**20
FROM_FILES = "shardwise, from files"
WAYS: dict[str, Callable[[NativeFSDPStrategy, nn.Module], None] | None] = {
    SENT: None,
    READ_AND_SENT: None,
    FROM_FILES: _shardwise,
    "shardwise, from memory": _shardwise,
    "set_model_state_dict": _set_model_state_dict,
}
