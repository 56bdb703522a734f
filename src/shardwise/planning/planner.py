"""Plan a load for a job of any size in one process: headers or a config, no weights, no process group."""

from __future__ import annotations

from typing import Any

import torch

from shardwise.errors import ConfigurationError
from shardwise.materialization import CpuStorage, checked_cpu_storage, default_staging_bytes
from shardwise.plan import check_route
from shardwise.planning.load_plan import LoadPlan
from shardwise.planning.mesh_shape import MeshShape, axes_of
from shardwise.planning.outlook import Setting, load_plan_of, outlook_of
from shardwise.planning.subject import subject_of
from shardwise.tensors import floating_dtype

DEVICES = ("cpu", "accelerator")


def plan_load(
    checkpoint_or_config: Any,
    *,
    mesh_shape: MeshShape,
    dtype: torch.dtype | str | None = None,
    route: str = "auto",
    model_cls: Any = None,
    device: str = "accelerator",
    ranks_per_node: int = 8,
    staging_bytes: int | None = None,
    cpu_storage: CpuStorage = "auto",
    revision: str | None = None,
    offload: bool = False,
) -> LoadPlan:
    """Say what `load_pretrained` and `wrap_model` of a strategy would cost, for any number of ranks.

    Nothing is read but headers, and no process group is needed. Every parameter is sharded on the dim that a strategy would choose, as
    `NativeFSDPStrategy` does it unless it is told otherwise; every rank is taken to see the files. With an axis `tp` the model is first
    cut by transformers' own plan of tensor parallelism, then sharded on dim 0, and filled by `materialize`.

    Args:
        checkpoint_or_config: A directory or file, or a hub id, whose headers are read, from the hub where they are not in its local
            cache; or a config of transformers, or a directory with nothing but its `config.json`. The stored tensors are then estimated.
        mesh_shape: Number of ranks that shard; (shards,); (replicas, shards); or sizes of axes by name, such as
            `{"dp_replicate": 2, "dp_shard": 4}` or `{"dp_shard": 4, "tp": 2}`.
        dtype: In which parameters are kept; None and `"auto"` are the checkpoint's own.
        route: Who reads what, as `materialize` takes it.
        model_cls: A transformers model or auto class; None is the class that the config names, else a causal language
            model.
        device: Where shards are: `"cpu"` or `"accelerator"`.
        ranks_per_node: How many ranks share a node.
        staging_bytes: Bound of a rank's staging buffers, in bytes; None is 64 MiB on CPU ranks and 256 MiB on accelerators.
        cpu_storage: As `materialize` takes it; of accelerators nothing is mapped.
        revision: Of a hub id.
        offload: Whether accelerator ranks keep shards in pinned host memory, as `fsdp_config["cpu_offload"]`.

    Returns:
        The plan. From headers its bytes are those that a run reports; where more ranks than can be planned one by one hold
        shards of the same shapes, one of them stands for the others.

    Raises:
        CheckpointError: The checkpoint is damaged, cannot be had, or does not fit the model.
        ConfigurationError: An argument is unknown or not possible.
        UnsupportedParameterError: FSDP2 cannot shard a parameter.
    """
    check_route(route)
    setting = setting_of(
        mesh_shape,
        device=device,
        ranks_per_node=ranks_per_node,
        staging_bytes=staging_bytes,
        cpu_storage=cpu_storage,
        offload=offload,
    )
    stored = floating_dtype(dtype or "auto", others=("auto",))
    subject = subject_of(checkpoint_or_config, dtype=stored, model_cls=model_cls, revision=revision)
    return load_plan_of(outlook_of(subject, setting), route=route)


def setting_of(
    mesh_shape: MeshShape,
    *,
    device: str,
    ranks_per_node: int,
    staging_bytes: int | None,
    cpu_storage: CpuStorage,
    offload: bool,
) -> Setting:
    """Check what `plan_load` was told of a job.

    Raises:
        ConfigurationError: An argument is unknown or not possible.
    """
    if device not in DEVICES:
        raise ConfigurationError(f"device: expected one of {', '.join(DEVICES)}, got {device!r}")
    if ranks_per_node < 1:
        raise ConfigurationError(f"ranks_per_node: expected at least 1, got {ranks_per_node}")
    if offload and device == "cpu":
        raise ConfigurationError(
            "offload: expected accelerator ranks, got device='cpu', where shards are in host memory already. Leave offload out."
        )
    return Setting(
        axes=axes_of(mesh_shape),
        device=device,
        offload=offload,
        ranks_per_node=ranks_per_node,
        staging_bytes=staging_bytes or default_staging_bytes(device),
        cpu_storage=checked_cpu_storage(cpu_storage, direct_io=False),
    )
