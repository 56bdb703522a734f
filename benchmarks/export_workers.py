"""What one rank does in `bench_export.py`: bring a model up, and write it, one way or another."""

from __future__ import annotations

import datetime
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from shardwise import NativeFSDPStrategy, export_checkpoint, profile_memory
from shardwise.materialization.placing import as_memory


def measure(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Load a model, its shards in memory, and write it; return seconds, peaks and a checksum of what was written.

    Args:
        arguments: `model` and `output` (directories), `way` (a key of `WAYS`) and `dtype` (of the shards).
    """
    from transformers import AutoModelForCausalLM

    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=20))
    strategy = NativeFSDPStrategy(mixed_precision="no", cpu_storage="copy")
    stored = arguments["dtype"] if arguments["dtype"] == "auto" else getattr(torch, arguments["dtype"])
    model = strategy.wrap_model(
        strategy.load_pretrained(AutoModelForCausalLM, arguments["model"], dtype=stored)
    )
    output = Path(arguments["output"])
    if dist.get_rank() == 0:
        os.sync()  # what is dirty from before is not this way's
    dist.barrier()
    with profile_memory() as profile:
        started = time.perf_counter()
        phases = WAYS[arguments["way"]](model, output)
        dist.barrier()
        returned = time.perf_counter() - started
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()
    stored_seconds = time.perf_counter() - started
    result = {
        "seconds": returned,
        "stored_seconds": stored_seconds,
        "host_anon_peak_bytes": profile.anon_peak_bytes,
        "phases": phases,
        "checksum": _checksum(output) if dist.get_rank() == 0 else {},
    }
    if dist.get_rank() == 0:
        shutil.rmtree(output)
    dist.destroy_process_group()
    return result


def _checksum(directory: Path) -> dict[str, float]:
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  not a mapping
                found[name] = round(file.get_tensor(name).double().sum().item(), 3)
    return found


def _shardwise(model: nn.Module, output: Path) -> dict[str, float]:
    return export_checkpoint(model, output).phases


def _gathered(model: Any, output: Path) -> dict[str, float]:
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        _drop_tied(model, state)  # whole tensors are not tied any more, and it would write both
        model.save_pretrained(output, state_dict=state)
    return {}


def _drop_tied(model: Any, state: dict[str, Any]) -> None:
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)


def _dcp(model: Any, output: Path) -> dict[str, float]:
    state = model.state_dict()
    _drop_tied(model, state)
    writer = HuggingFaceStorageWriter(
        str(output), save_distributed=True, enable_consolidation=True, thread_count_consolidation=2
    )
    dcp.save(state, storage_writer=writer)
    return {}


def _raw(model: nn.Module, output: Path) -> dict[str, float]:
    """Write the bytes of this rank's shards, one after the other, to a file of its own."""
    output.mkdir(exist_ok=True)
    with (output / f"rank-{dist.get_rank()}").open("wb", buffering=0) as file:
        for parameter in {id(p): p for p in model.parameters()}.values():
            left = as_memory(parameter.to_local())
            while len(left):
                left = left[file.write(left) :]
        os.fsync(file.fileno())
    return {}


RAW = "floor: as many bytes written"
WAYS = {
    RAW: _raw,
    "shardwise": _shardwise,
    "save_pretrained of a gathered state dict": _gathered,
    "DCP's Hugging Face writer": _dcp,
}
