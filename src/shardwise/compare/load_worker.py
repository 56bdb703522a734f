"""What one rank does for `shardwise load`: bring a model up from its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from shardwise.compare.announce import announce
from shardwise.compare.worker import join_group


def load_model(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Load a model through a strategy, and forget it.

    Args:
        arguments: `model` (directory or hub id), `strategy` (a key of `STRATEGIES`), `dtype`, `mixed_precision`, `route` and
            `cpu_storage` as the strategy and its `load_pretrained` take them.

    Returns:
        The load report as JSON, with its `summary`.
    """
    announce("starting ranks")
    from transformers import AutoModelForCausalLM

    from shardwise.strategies import STRATEGIES

    device = join_group()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    strategy = STRATEGIES[arguments["strategy"]](
        device_mesh=mesh,
        mixed_precision=arguments["mixed_precision"],
        route=arguments["route"],
        cpu_storage=arguments["cpu_storage"],
    )
    announce("loading")
    model = strategy.load_pretrained(AutoModelForCausalLM, arguments["model"], dtype=arguments["dtype"])
    strategy.wrap_model(model)
    report = strategy.last_report
    dist.barrier()  # a rank that ended would be missed by those that still close their connections
    dist.destroy_process_group()
    return {**report.to_json(), "summary": str(report)}
