"""The mesh of a job that is not running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardwise.errors import ConfigurationError
from shardwise.strategies.mesh import REPLICATE_AXES, SHARD_AXES

MeshShape = int | Sequence[int] | Mapping[str, int]
TENSOR_AXIS = "tp"


def axes_of(mesh_shape: MeshShape) -> dict[str, int]:
    """Return the sizes of a mesh's axes by name: replicas first, then shards, then tensor parallelism, where there are several.

    Args:
        mesh_shape: Number of ranks; sizes of one axis that shards, or of one that replicates and one that shards; or sizes
            by name, which may have an axis `tp` beside these.

    Raises:
        ConfigurationError: It is no such mesh.
    """
    if isinstance(mesh_shape, Mapping):
        axes = dict(mesh_shape)
    else:
        sizes = (mesh_shape,) if isinstance(mesh_shape, int) else tuple(mesh_shape)
        names = ("dp_shard",) if len(sizes) == 1 else ("dp_replicate", "dp_shard")
        axes = dict(zip(names, sizes, strict=True)) if len(sizes) == len(names) else {}
    replicates = [name for name in axes if name in REPLICATE_AXES]
    shards = [name for name in axes if name in SHARD_AXES]
    tensors = [name for name in axes if name == TENSOR_AXIS]
    if len(axes) > 1 and len(shards) == 1 and len(replicates) < 2:
        named = (*replicates, *shards, *tensors)
        axes = {name: axes[name] for name in named} if len(named) == len(axes) else {}
    elif len(axes) != 1 or tensors:
        axes = {}
    if not axes:
        raise ConfigurationError(
            f"mesh_shape: expected a number of ranks, (shards,), (replicas, shards), or axes by name: one of "
            f"{' or '.join(SHARD_AXES)}, with or without one of {' or '.join(REPLICATE_AXES)} and {TENSOR_AXIS}; got "
            f"{mesh_shape!r}."
        )
    if any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in axes.values()):
        raise ConfigurationError(f"mesh_shape: expected whole numbers from 1 on, got {mesh_shape!r}.")
    return axes


def shard_ranks_of(axes: Mapping[str, int]) -> int:
    """Return over how many ranks FSDP2 shards each parameter: of two axes or three the one between replicas and tensor parallelism.

    Args:
        axes: As `axes_of` returned them.
    """
    sizes = [size for name, size in axes.items() if name != TENSOR_AXIS]
    return sizes[-1]
