"""What one rank does for `shardwise export`: bring up a model's structure, and write a saved training, or the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from shardwise.compare.announce import announce
from shardwise.compare.worker import join_group


def export_model(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Write a directory for `from_pretrained`.

    Args:
        arguments: `model` (directory or hub id), `state` (directory of a saved training, or None for the model's own values),
            `trained_adapters` (config of each adapter of the saved training, as JSON, by name), `directory`, and the options of
            `TransformersModel.export`.

    Returns:
        The report as JSON, with its `summary`.
    """
    announce("starting ranks")
    from shardwise.transformers_model import TransformersModel
    from shardwise.transformers_model.trained import peft_config_of

    device = join_group()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    model = TransformersModel(
        arguments["model"],
        device_mesh=mesh,
        mixed_precision="no",
        strategy="native_fsdp",
        trust_remote_code=arguments["trust_remote_code"],
    )
    for name, config in arguments["trained_adapters"].items():
        model.add_adapter_to_model(name, peft_config_of(config))
    announce(f"writing {arguments['directory']}")
    report = model.export(
        Path(arguments["directory"]),
        dtype=arguments["dtype"],
        max_shard_size=arguments["max_shard_size"],
        overwrite=arguments["overwrite"],
        adapters=arguments["adapters"],
        state=arguments["state"],
    )
    dist.destroy_process_group()
    return {**report.to_json(), "summary": report.summary()}
