"""What one rank does for `shardwise verify`: bring a model up from its files, and compare its shards with a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from shardwise.compare.announce import announce
from shardwise.compare.worker import join_group


def verify_model(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Load a model, its shards copied out of the files, and verify them.

    Args:
        arguments: `model` (directory or hub id) and `against` (the checkpoint to compare with).

    Returns:
        The report as JSON, with its `summary`.
    """
    announce("starting ranks")
    from transformers import AutoModelForCausalLM

    from shardwise.materialization import verify_shards
    from shardwise.strategies import NativeFSDPStrategy

    device = join_group()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    strategy = NativeFSDPStrategy(device_mesh=mesh, mixed_precision="no", cpu_storage="copy")
    announce("loading")
    model = strategy.wrap_model(strategy.load_pretrained(AutoModelForCausalLM, arguments["model"]))
    announce("comparing")
    report = verify_shards(model, arguments["against"])
    dist.destroy_process_group()
    return {**report.to_json(), "summary": report.summary()}
