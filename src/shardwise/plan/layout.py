"""Which region of a full tensor each rank owns, for a mesh and placements."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from shardwise.conversion import Piece
from shardwise.errors import ConfigurationError, UnsupportedParameterError
from shardwise.tensors import Region

Interval = tuple[int, int]  # [start, stop) along one dim, in elements


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A box of a full tensor and where it lies in a rank's shard.

    Args:
        region: In the full tensor, in elements.
        local: In the shard, in elements; of the same shape.
    """

    region: Region
    local: Region

    def local_of(self, region: Region) -> Region:
        """Return where a box inside of `self.region` lies in the shard."""
        shift = tuple(b - a for a, b in zip(self.region.start, self.local.start, strict=True))
        return Region(
            start=tuple(a + by for a, by in zip(region.start, shift, strict=True)),
            stop=tuple(a + by for a, by in zip(region.stop, shift, strict=True)),
        )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one full tensor lies over a device mesh.

    Args:
        mesh_shape: Ranks per mesh axis.
        mesh_ranks: Global ranks in row-major order of the mesh.
        placements: One per mesh axis; `Shard` on any dim, `_StridedShard`, or `Replicate`.

    Raises:
        ConfigurationError: The three do not fit together.
        UnsupportedParameterError: A placement is of another kind.

    Source: `torch.distributed.tensor` places a `Shard(dim)` by chunks of ceil(size / ranks) elements, outer mesh axes
    first; the last chunks may be short or empty. A `_StridedShard` whose split factor is the number of shards that later
    axes make of the same dim says that these came first, as FSDP2 does it on top of tensor parallelism; any other one
    takes every rank's chunk out of `split_factor` equal parts.
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
            if not isinstance(placement, (Shard, _StridedShard, Replicate)):
                raise UnsupportedParameterError(
                    f"layout: expected Shard or Replicate on every mesh axis, got {self.placements}. A partial sum has no "
                    "values of its own to load: redistribute the parameter first."
                )

    @classmethod
    def replicated(cls, ranks: Sequence[int]) -> Layout:
        """Return the layout in which each of `ranks` keeps the full tensor."""
        return cls(mesh_shape=(len(ranks),), mesh_ranks=tuple(ranks), placements=(Replicate(),))

    @cached_property
    def copies(self) -> int:
        """How many ranks of the mesh keep each element."""
        sizes = zip(self.mesh_shape, self.placements, strict=True)
        return math.prod(size for size, placement in sizes if isinstance(placement, Replicate))

    @cached_property
    def _position_of_rank(self) -> dict[int, int]:
        return {rank: position for position, rank in enumerate(self.mesh_ranks)}

    @cached_property
    def _replicas_of_rank(self) -> dict[int, tuple[int, ...]]:
        return {}

    @cached_property
    def _known_parts(self) -> dict[tuple[tuple[int, ...], int], tuple[Part, ...]]:
        return {}  # the layers of a model repeat their shapes

    @cached_property
    def _known_pieces(self) -> dict[tuple[Piece, tuple[int, ...], int], tuple[Piece, ...]]:
        return {}

    @cached_property
    def _known_runs(self) -> dict[tuple[Piece, tuple[int, ...], int], range | None]:
        return {}

    @cached_property
    def _known_shapes(self) -> dict[tuple[tuple[int, ...], int], tuple[int, ...] | None]:
        return {}

    @cached_property
    def shards_rows_only(self) -> bool:
        """Whether no dim but the first is sharded."""
        return all(
            placement.dim == 0
            for placement in self.placements
            if isinstance(placement, (Shard, _StridedShard))
        )

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

    def replicas(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that keep the same elements as a global rank, itself among them, in the order of the mesh.

        Args:
            rank: A global rank; one outside of the mesh keeps nothing, as nobody else does.
        """
        if rank not in self._replicas_of_rank:
            own = self.coordinate(rank)
            self._replicas_of_rank[rank] = () if own is None else tuple(self._ranks_along_copies(own))
        return self._replicas_of_rank[rank]

    @cached_property
    def replica_groups(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that keep the same elements, group by group, all in order; nothing where each element is kept once."""
        if self.copies == 1:
            return ()
        return tuple(sorted(tuple(sorted(group)) for group in self.ranks_of_shards))

    @cached_property
    def ranks_of_shards(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that keep each shard, by the coordinates of the axes that shard, outer ones first."""
        shards = [axis for axis, p in enumerate(self.placements) if not isinstance(p, Replicate)]
        copies = [axis for axis, p in enumerate(self.placements) if isinstance(p, Replicate)]
        by_shard = np.array(self.mesh_ranks).reshape(self.mesh_shape).transpose(*shards, *copies)
        return tuple(map(tuple, by_shard.reshape(-1, self.copies).tolist()))

    def _ranks_along_copies(self, own: tuple[int, ...]) -> Iterator[int]:
        axes = (
            range(size) if isinstance(placement, Replicate) else (at,)
            for size, placement, at in zip(self.mesh_shape, self.placements, own, strict=True)
        )
        for coordinate in itertools.product(*axes):
            position = 0
            for size, at in zip(self.mesh_shape, coordinate, strict=True):
                position = position * size + at
            yield self.mesh_ranks[position]

    def region(self, shape: tuple[int, ...], rank: int) -> Region | None:
        """Return the region of a full tensor of `shape` that a global rank owns, or None if it owns none of it.

        Args:
            shape: Of the full tensor, in elements.
            rank: A global rank.

        Returns:
            The region, possibly empty; None when the rank is not part of the mesh.
        """
        intervals = self._intervals(shape, rank)
        if intervals is None:
            return None
        if any(len(of_dim) > 1 for of_dim in intervals):
            raise UnsupportedParameterError(
                f"layout: expected one box per rank of a tensor of shape {shape}, got several with {self.placements}"
            )
        return Region(
            start=tuple(of_dim[0][0] for of_dim in intervals),
            stop=tuple(of_dim[0][1] for of_dim in intervals),
        )

    def parts(self, shape: tuple[int, ...], rank: int) -> tuple[Part, ...]:
        """Return the boxes of a full tensor of `shape` that a global rank owns, in the order of its shard.

        Args:
            shape: Of the full tensor, in elements.
            rank: A global rank.

        Returns:
            Boxes that are not empty; none where the rank owns nothing or is not part of the mesh.
        """
        known = self._known_parts.get((shape, rank))
        if known is None:
            known = self._known_parts[shape, rank] = self._parts(shape, rank)
        return known

    def _parts(self, shape: tuple[int, ...], rank: int) -> tuple[Part, ...]:
        intervals = self._intervals(shape, rank)
        if intervals is None:
            return ()
        placed: list[list[tuple[Interval, Interval]]] = []
        for of_dim in intervals:
            position, with_local = 0, []
            for start, stop in of_dim:
                with_local.append(((start, stop), (position, position + stop - start)))
                position += stop - start
            placed.append(with_local)
        boxes = (
            Part(region=_box([full for full, _ in box]), local=_box([local for _, local in box]))
            for box in itertools.product(*placed)
        )
        return tuple(part for part in boxes if part.region.numel > 0)

    def local_pieces(self, piece: Piece, shape: tuple[int, ...], rank: int) -> tuple[Piece, ...]:
        """Return what a rank owns of a piece of a full tensor of `shape`; targets are places in its shard."""
        key = (piece, shape, rank)
        known = self._known_pieces.get(key)
        if known is None:
            known = self._known_pieces[key] = tuple(
                inside.moved(part.local.start) if any(part.local.start) else inside
                for part in self.parts(shape, rank)
                for inside in piece.within(part.region)
            )
        return known

    def run_of(self, piece: Piece, shape: tuple[int, ...], rank: int) -> range | None:
        """Return a rank's shard as a run of the source's elements; None where it is not one, or smaller than the largest shard.

        Args:
            piece: That a full tensor of `shape` is.
            shape: Of the full tensor, in elements.
            rank: A global rank.
        """
        key = (piece, shape, rank)
        if key not in self._known_runs:
            local = self.local_pieces(piece, shape, rank)
            largest = self.local_shape(shape, self.mesh_ranks[0])
            is_run = len(local) == 1 and local[0].is_one_run and local[0].region.shape == largest
            first = local[0].source_start if is_run else 0
            self._known_runs[key] = range(first, first + local[0].numel) if is_run else None
        return self._known_runs[key]

    def local_shape(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...] | None:
        """Return the shape of a global rank's shard, or None if it is not part of the mesh."""
        if (shape, rank) not in self._known_shapes:
            intervals = self._intervals(shape, rank)
            self._known_shapes[shape, rank] = (
                None
                if intervals is None
                else tuple(sum(stop - start for start, stop in of_dim) for of_dim in intervals)
            )
        return self._known_shapes[shape, rank]

    def _intervals(self, shape: tuple[int, ...], rank: int) -> list[list[Interval]] | None:
        coordinate = self.coordinate(rank)
        if coordinate is None:
            return None
        axes_of_dim: dict[int, list[int]] = {}
        for axis, placement in enumerate(self.placements):
            if not isinstance(placement, (Shard, _StridedShard)):
                continue
            if not 0 <= placement.dim < len(shape):
                raise ConfigurationError(
                    f"layout: expected placements on dims of a tensor of shape {shape}, got {placement!r}"
                )
            axes_of_dim.setdefault(placement.dim, []).append(axis)
        intervals: list[list[Interval]] = [[(0, size)] for size in shape]
        for dim, axes in axes_of_dim.items():
            for axis, split_factor in self._in_order_of_sharding(axes):
                size, index = self.mesh_shape[axis], coordinate[axis]
                intervals[dim] = _chunk(intervals[dim], size, index, split_factor)
        return intervals

    def _in_order_of_sharding(self, axes: Sequence[int]) -> list[tuple[int, int]]:
        """Return (axis, split factor) in the order in which one dim was cut."""
        if not axes:
            return []
        first, later = axes[0], axes[1:]
        placement = self.placements[first]
        factor = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        if factor > 1 and factor == math.prod(self.mesh_shape[axis] for axis in later):
            return [*self._in_order_of_sharding(later), (first, 1)]
        return [(first, factor), *self._in_order_of_sharding(later)]


def _box(intervals: Sequence[Interval]) -> Region:
    return Region(start=tuple(start for start, _ in intervals), stop=tuple(stop for _, stop in intervals))


def _chunk(owned: list[Interval], ranks: int, index: int, split_factor: int) -> list[Interval]:
    """Return what rank `index` of `ranks` keeps of the elements in `owned`, cut into `split_factor` parts before."""
    length = sum(stop - start for start, stop in owned)
    step = -(-length // split_factor)
    kept: list[Interval] = []
    for part in range(split_factor):
        low, high = min(part * step, length), min((part + 1) * step, length)
        rows = -(-(high - low) // ranks)
        start = min(low + index * rows, high)
        kept += _at_positions(owned, start, min(start + rows, high))
    return kept or [(owned[-1][1], owned[-1][1])]


def _at_positions(owned: list[Interval], start: int, stop: int) -> list[Interval]:
    """Return the elements at positions [start, stop) of the concatenated intervals."""
    found, position = [], 0
    for low, high in owned:
        first, last = max(start, position), min(stop, position + high - low)
        if first < last:
            found.append((low + first - position, low + last - position))
        position += high - low
    return found
