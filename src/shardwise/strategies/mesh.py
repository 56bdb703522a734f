"""The device mesh of a strategy: checked, or made over the default process group."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardwise.errors import ConfigurationError
from shardwise.materialization import ranks_of_group

REPLICATE_AXES = ("dp_replicate", "dp")
SHARD_AXES = ("dp_shard", "fsdp", "dp_shard_cp")  # the last is Accelerate's flattened shard x context axis


def resolve_mesh(device_mesh: DeviceMesh | None) -> DeviceMesh:
    """Return the mesh that parameters are sharded on.

    Args:
        device_mesh: One axis of any name shards; two axes are replicate x shard, named `dp_replicate` or `dp`, and
            `dp_shard` or `fsdp`. None makes one shard axis over the default group on the default device, and the
            default group itself where there is none: from the launcher's environment, else of this process alone.

    Returns:
        A mesh of one axis (FSDP) or two (HSDP: replicate first, shard second).

    Raises:
        ConfigurationError: The mesh has other axes, or does not hold this rank.
    """
    if device_mesh is None:
        _ensure_default_group()
        return init_device_mesh(default_device_type(), (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    names = tuple(device_mesh.mesh_dim_names or ())
    if device_mesh.get_coordinate() is None:
        raise ConfigurationError(
            f"device_mesh: expected a mesh that holds this rank ({dist.get_rank()} of {dist.get_world_size()}), got "
            f"ranks {device_mesh.mesh.tolist()}. Make the strategy only on the ranks of its mesh."
        )
    if device_mesh.ndim == 1:
        return device_mesh
    if len(names) == 2 and names[0] in REPLICATE_AXES and names[1] in SHARD_AXES:
        return device_mesh
    raise ConfigurationError(
        f"device_mesh: expected one axis, or two named {' or '.join(REPLICATE_AXES)} and {' or '.join(SHARD_AXES)} "
        f"in this order, got axes {names or 'without names'} of shape {tuple(device_mesh.shape)}. Pass the part of "
        "the mesh that shards, for example device_mesh['dp_replicate', 'dp_shard']."
    )


def device_type_of(device_mesh: DeviceMesh | None) -> str:
    """Return the device type of a strategy's `device_mesh` argument; None stands for the default one.

    Raises:
        ConfigurationError: It is no mesh.
    """
    if device_mesh is None:
        return default_device_type()
    if not isinstance(device_mesh, DeviceMesh):
        raise ConfigurationError(
            f"device_mesh: expected a torch DeviceMesh or None, got {device_mesh!r}. Make one with "
            "torch.distributed.device_mesh.init_device_mesh(device_type, shape, mesh_dim_names=('dp_shard',)); None is one "
            "axis over all ranks."
        )
    return device_mesh.device_type


def default_device_type() -> str:
    """Return the accelerator's type if it has collectives and each local rank can have one, else the CPU's."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or dist.get_default_backend_for_device(accelerator) == dist.Backend.GLOO:
        return "cpu"
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return accelerator.type if torch.accelerator.device_count() >= local_ranks else "cpu"


def ranks_of(mesh: DeviceMesh) -> tuple[int, ...]:
    """Return the global ranks of a mesh in ascending order."""
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def ranks_to_tell(device_mesh: object) -> tuple[int, ...]:
    """Return the ranks that a strategy is made on together, given its `device_mesh` argument, whatever that is.

    A mesh without this rank is nobody's: then, as where there is none, these are the ranks of the default group.
    """
    if isinstance(device_mesh, DeviceMesh) and device_mesh.get_coordinate() is not None:
        return ranks_of(device_mesh)
    return ranks_of_group(None)


def source_rank_of(mesh: DeviceMesh) -> int:
    """Return the rank whose values win: global rank 0, or the lowest rank of a mesh without it."""
    return ranks_of(mesh)[0]


def _ensure_default_group() -> None:
    if dist.is_initialized():
        return
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        dist.init_process_group()
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError(
            f"device_mesh=None: expected an initialised process group for WORLD_SIZE={os.environ['WORLD_SIZE']}, got "
            "none, and RANK, MASTER_ADDR or MASTER_PORT is not set. Start with torchrun or accelerate launch, or call "
            "torch.distributed.init_process_group first."
        )
    else:
        dist.init_process_group(store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
