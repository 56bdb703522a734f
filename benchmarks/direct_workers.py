"""What one rank does in `bench_direct.py`: from nothing to a sharded model with values, one way or another."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shardwise import NativeFSDPStrategy, profile_memory

_PAGE_BYTES = 4096


def measure(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a model up; return seconds until it is ready and until it is resident, peaks and bytes.

    Args:
        arguments: `model` (a directory), `dtype` (torch's name of it, or `auto`) and `way` (a key of `WAYS`).
    """
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM._model_mapping  # noqa: B018  the imports are not what is measured

    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=20))
    dist.barrier()
    before = _bytes_from_disk()
    report = None
    with profile_memory() as profile:
        started = time.perf_counter()
        model, report = WAYS[arguments["way"]](arguments["model"], arguments["dtype"])
        dist.barrier()
        ready = time.perf_counter() - started
    peak = profile.anon_peak_bytes
    if arguments["way"] != "floor":
        _touch(model)
        dist.barrier()
    resident = time.perf_counter() - started
    result = {
        "ready_seconds": ready,
        "resident_seconds": resident,
        "host_anon_peak_bytes": peak,
        "disk_bytes": _bytes_from_disk() - before,
        "requested_bytes": report.storage_bytes if report is not None else 0,
        "phases": report.phases if report is not None else {},
        "shard_bytes": sum(_local(p).nbytes for p in {id(p): p for p in model.parameters()}.values()),
        "checksum": _checksum(model) if arguments["way"] != "floor" else 0.0,
    }
    dist.destroy_process_group()
    return result


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _touch(model: nn.Module) -> None:
    """Read one byte of every page of every shard."""
    for parameter in model.parameters():
        flat = _local(parameter).detach().view(-1)
        flat[:: max(1, _PAGE_BYTES // flat.element_size())].sum()


def _checksum(model: nn.Module) -> float:
    unique = {id(p): p for p in model.parameters()}.values()
    total = torch.tensor([sum(_local(p).detach().double().sum().item() for p in unique)])
    dist.all_reduce(total)
    return round(total.item(), 3)


def _bytes_from_disk() -> int:
    """Bytes that the kernel has fetched from storage for this process, page faults included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _empty(directory: str, dtype: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    stored = config.dtype if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=stored)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard([model.model.embed_tokens, model.lm_head])
    fully_shard(model)
    return model


def _floor(directory: str, dtype: str) -> tuple[nn.Module, Any]:
    return _empty(directory, dtype), None


def _shardwise(cpu_storage: str) -> Callable[[str, str], tuple[nn.Module, Any]]:
    def load(directory: str, dtype: str) -> tuple[nn.Module, Any]:
        from transformers import AutoModelForCausalLM

        strategy = NativeFSDPStrategy(mixed_precision="no", cpu_storage=cpu_storage)
        stored = dtype if dtype == "auto" else getattr(torch, dtype)
        model = strategy.load_pretrained(AutoModelForCausalLM, directory, dtype=stored)
        return strategy.wrap_model(model), strategy.last_report

    return load


def _transformers(directory: str, dtype: str) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(fsdp_size=dist.get_world_size())
    stored = dtype if dtype == "auto" else getattr(torch, dtype)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=stored, distributed_config=config), None


def _dcp(directory: str, dtype: str) -> tuple[nn.Module, Any]:
    model = _empty(directory, dtype)
    model.to_empty(device="cpu")
    state = model.state_dict()
    # What is tied is on disk once.
    state = {
        name: value
        for name, value in state.items()
        if name != "lm_head.weight" or not model.config.tie_word_embeddings
    }
    dcp.load(state, storage_reader=HuggingFaceStorageReader(directory))
    return model, None


WAYS: dict[str, Callable[[str, str], tuple[nn.Module, Any]]] = {
    "floor": _floor,
    "shardwise, mapped": _shardwise("auto"),
    "shardwise, copied": _shardwise("copy"),
    "transformers": _transformers,
    "DCP reader": _dcp,
}
