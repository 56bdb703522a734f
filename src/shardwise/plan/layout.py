"""Which region of a full tensor each rank owns, for a mesh and placements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from shardwise.errors import ConfigurationError, UnsupportedParameterError
from shardwise.tensors import Region


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one full tensor lies over a device mesh.

    Args:
        mesh_shape: Ranks per mesh axis.
        mesh_ranks: Global ranks in row-major order of the mesh.
        placements: One per mesh axis; `Shard` on any dim, or `Replicate`.

    Raises:
        ConfigurationError: The three do not fit together.
        UnsupportedParameterError: A placement is of another kind.

    Source: `torch.distributed.tensor` places a `Shard(dim)` by chunks of ceil(size / ranks) elements,
    outer mesh axes first; the last chunks may be short or empty.
    """

    mesh_shape: tuple[int, ...]
    mesh_ranks: tuple[int, ...]
    placements: tuple[Placement, ...]

    def __post_init__(self) -> None:
        if math.prod(self.mesh_shape) != len(self.mesh_ranks) or len(set(self.mesh_ranks)) != len(
            self.mesh_ranks
        ):
            raise ConfigurationError(
                f"layout: expected {math.prod(self.mesh_shape)} different ranks for a mesh of shape "
                f"{self.mesh_shape}, got {self.mesh_ranks}"
            )
        if len(self.placements) != len(self.mesh_shape):
            raise ConfigurationError(
                f"layout: expected one placement per mesh axis ({len(self.mesh_shape)}), got {self.placements}"
            )
        for placement in self.placements:
            if type(placement) not in (Shard, Replicate):
                raise UnsupportedParameterError(
                    f"layout: expected Shard or Replicate on every mesh axis, got {self.placements}. "
                    "Apply tensor parallelism after the weights are in place, or not at all with this strategy."
                )

    @classmethod
    def replicated(cls, ranks: Sequence[int]) -> Layout:
        """Return the layout in which each of `ranks` keeps the full tensor."""
        return cls(mesh_shape=(len(ranks),), mesh_ranks=tuple(ranks), placements=(Replicate(),))

    @cached_property
    def _position_of_rank(self) -> dict[int, int]:
        return {rank: position for position, rank in enumerate(self.mesh_ranks)}

    def coordinate(self, rank: int) -> tuple[int, ...] | None:
        """Return the mesh coordinate of a global rank, or None if it is not part of the mesh."""
        position = self._position_of_rank.get(rank)
        if position is None:
            return None
        coordinate = []
        for size in reversed(self.mesh_shape):
            position, index = divmod(position, size)
            coordinate.append(index)
        return tuple(reversed(coordinate))

    def region(self, shape: tuple[int, ...], rank: int) -> Region | None:
        """Return the region of a full tensor of `shape` that a global rank owns, or None if it owns none of it.

        Args:
            shape: Of the full tensor, in elements.
            rank: A global rank.

        Returns:
            The region, possibly empty; None when the rank is not part of the mesh.
        """
        coordinate = self.coordinate(rank)
        if coordinate is None:
            return None
        start, stop = [0] * len(shape), list(shape)
        for size, index, placement in zip(self.mesh_shape, coordinate, self.placements, strict=True):
            if not isinstance(placement, Shard):
                continue
            dim = placement.dim
            if not 0 <= dim < len(shape):
                raise ConfigurationError(
                    f"layout: expected placements on dims of a tensor of shape {shape}, got {placement!r}"
                )
            rows = -(-(stop[dim] - start[dim]) // size)
            low = min(start[dim] + index * rows, stop[dim])
            start[dim], stop[dim] = low, min(low + rows, stop[dim])
        return Region(start=tuple(start), stop=tuple(stop))
