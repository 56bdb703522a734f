"""What one rank does in `bench_direct.py`: from nothing to a sharded model with values, one way or another."""

from __future__ import annotations

import datetime
import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from floors import raw_read
from shardwise import NativeFSDPStrategy, profile_memory
from shardwise.compare.peers import PEERS
from whole_loaders import LOADERS, files_of

_PAGE_BYTES = 4096
FLOOR, RAW_READ, RAW_COPY = "floor", "raw read", "raw read, kept"
FLOORS = (FLOOR, RAW_READ, RAW_COPY)


def measure(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a model up; return seconds until it is ready and until it is resident, peaks and bytes.

    Args:
        arguments: `model` (a directory), `dtype` (torch's name of it, or `auto`) and `way` (a key of `WAYS`).
    """
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM._model_mapping  # noqa: B018  the imports are not what is measured

    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=20))
    way = arguments["way"]
    if way in LOADERS:
        importlib.import_module(LOADERS[way][0])
    dist.barrier()
    before, cpu_before = _bytes_from_disk(), time.process_time()
    report = None
    with profile_memory() as profile:
        started = time.perf_counter()
        model, report = WAYS[way](arguments["model"], arguments["dtype"])
        dist.barrier()
        ready = time.perf_counter() - started
    peak = profile.anon_peak_bytes
    has_values = way not in FLOORS
    if has_values:
        touch(model)
        dist.barrier()
    resident = time.perf_counter() - started
    result = {
        "ready_seconds": ready,
        "resident_seconds": resident,
        "cpu_seconds": time.process_time() - cpu_before,
        "host_anon_peak_bytes": peak,
        "disk_bytes": _bytes_from_disk() - before,
        "requested_bytes": report.storage_bytes if report is not None else 0,
        "phases": report.phases if report is not None else {},
        "shard_bytes": local_bytes(model),
        "checksum": _checksum(model) if has_values else 0.0,
    }
    dist.destroy_process_group()
    return result


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def touch(model: nn.Module) -> None:
    """Read one byte of every page of every shard."""
    for parameter in model.parameters():
        flat = _local(parameter).detach().view(-1)
        flat[:: max(1, _PAGE_BYTES // flat.element_size())].sum()


def local_bytes(model: nn.Module) -> int:
    """Return the bytes of this rank's shards, without padding; a tied one counts once."""
    return sum(_local(p).nbytes for p in {id(p): p for p in model.parameters()}.values())


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


def _raw(*, keep: bool) -> Callable[[str, str], tuple[nn.Module, Any]]:
    def read(directory: str, dtype: str) -> tuple[nn.Module, Any]:
        raw_read(directory, keep=keep)
        return nn.Module(), None

    return read


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


def _peer(name: str) -> Callable[[str, str], tuple[nn.Module, Any]]:
    """Return a way of `shardwise compare --peers`."""

    def load(directory: str, dtype: str) -> tuple[nn.Module, Any]:
        from transformers import AutoModelForCausalLM

        peer = PEERS[name](init_device_mesh("cpu", (dist.get_world_size(),)))
        stored = dtype if dtype == "auto" else getattr(torch, dtype)
        return peer.wrap_model(peer.load_pretrained(AutoModelForCausalLM, directory, dtype=stored)), None

    return load


def _cut(loader: str) -> Callable[[str, str], tuple[nn.Module, Any]]:
    """Return a way that takes whole tensors from a loader and keeps this rank's rows of each."""

    def load(directory: str, dtype: str) -> tuple[nn.Module, Any]:
        model = _empty(directory, dtype)
        model.to_empty(device="cpu")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        rank, ranks = dist.get_rank(), dist.get_world_size()
        with torch.no_grad():
            for name, tensor in LOADERS[loader][1](files_of(directory)):
                rows = tensor.chunk(ranks)  # as `fully_shard` cuts
                if rank < len(rows):
                    _local(parameters[name]).copy_(rows[rank])
        return model, None

    return load


WAYS: dict[str, Callable[[str, str], tuple[nn.Module, Any]]] = {
    FLOOR: _floor,
    RAW_READ: _raw(keep=False),
    RAW_COPY: _raw(keep=True),
    "shardwise, mapped": _shardwise("auto"),
    "shardwise, copied": _shardwise("copy"),
    "transformers": _transformers,
    "DCP reader": _dcp,
    "set_model_state_dict": _peer("set-model-state-dict"),
    "Accelerate": _peer("accelerate-stock"),
    **{name: _cut(name) for name in LOADERS},
}
WITHOUT_CONVERSIONS = ("DCP reader", *LOADERS)
"""Ways that cannot make a model out of a checkpoint of another layout."""
