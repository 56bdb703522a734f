"""The mesh of a job that is not running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardwise.errors import ConfigurationError
from shardwise.strategies.mesh import REPLICATE_AXES, SHARD_AXES

MeshShape = int | Sequence[int] | Mapping[str, int]


def axes_of(mesh_shape: MeshShape) -> dict[str, int]:
    """Return the sizes of a mesh's axes by name: one that shards, or one that replicates and one that shards.

    Args:
        mesh_shape: Number of ranks; sizes of one axis that shards, or of one that replicates and one that shards; or sizes
            by name.

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
    if len(axes) == 2 and len(replicates) == len(shards) == 1:
        axes = {name: axes[name] for name in (*replicates, *shards)}
    elif len(axes) != 1:
        raise ConfigurationError(
            f"mesh_shape: expected a number of ranks, (shards,), (replicas, shards), or one axis or two named "
            f"{' or '.join(REPLICATE_AXES)} and {' or '.join(SHARD_AXES)}, got {mesh_shape!r}."
        )
    if any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in axes.values()):
        raise ConfigurationError(f"mesh_shape: expected whole numbers from 1 on, got {mesh_shape!r}.")
    return axes
