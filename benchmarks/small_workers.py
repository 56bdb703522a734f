"""What one rank does in `bench_small.py`: fill a model of many tensors, and count the reads."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.checkpoint import SafetensorsSource


def measure(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Fill a model; return the seconds of the call, those of `fully_shard` before it, and the number of reads on this rank.

    Args:
        arguments: `model` (a directory), `count` and `rows` of its tensors, `columns`, and `cpu_storage`.
    """
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=20))
    with torch.device("meta"):
        model = nn.Module()
        for index in range(arguments["count"]):
            shape = (arguments["rows"], arguments["columns"])
            model.register_parameter(f"w{index}", nn.Parameter(torch.empty(shape, dtype=torch.bfloat16)))
    started = time.perf_counter()
    fully_shard(model)
    shard_seconds = time.perf_counter() - started
    reads = 0
    original = SafetensorsSource.read_scattered

    def counted(
        self: SafetensorsSource, file: str, offset: int, parts: Sequence[memoryview]
    ) -> None:  # every read comes here
        nonlocal reads
        reads += 1
        original(self, file, offset, parts)

    SafetensorsSource.read_scattered = counted  # type: ignore[method-assign]
    dist.barrier()
    started = time.perf_counter()
    report = sw.materialize(model, arguments["model"], cpu_storage=arguments["cpu_storage"])
    dist.barrier()
    seconds = time.perf_counter() - started
    dist.destroy_process_group()
    return {"seconds": seconds, "shard_seconds": shard_seconds, "reads": reads, "phases": report.phases}
