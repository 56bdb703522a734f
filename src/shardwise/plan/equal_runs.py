"""Pieces of a stored tensor that belong to ranks in equal runs of elements: most of all, shards of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from shardwise.conversion import Piece
from shardwise.plan.boxes import shift_of
from shardwise.plan.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualRuns:
    """Where the runs of a piece begin.

    Args:
        offset: From an element of the stored tensor to one of the tensor, both row-major.
        numel: Elements of the tensor that each rank owns, but for the last ones; the first rank from element 0 on.
    """

    offset: int
    numel: int


def equal_runs(piece: Piece, shape: tuple[int, ...], layout: Layout) -> EqualRuns | None:
    """Return how a piece's elements belong to ranks, if that is in equal runs.

    Args:
        piece: That a tensor of `shape` takes of a stored one.
        shape: Of the tensor.
        layout: Of the tensor.
    """
    sharded = [p for p in layout.placements if isinstance(p, (Shard, _StridedShard))]
    if any(isinstance(p, _StridedShard) or p.dim != 0 for p in sharded) or len(sharded) > 1:
        return None
    shift = shift_of(piece, shape)
    if shift is None:
        return None
    if not sharded:
        return EqualRuns(offset=shift, numel=math.prod(shape))
    shards = len(layout.mesh_ranks) // layout.copies
    return EqualRuns(offset=shift, numel=-(-shape[0] // shards) * math.prod(shape[1:]))
