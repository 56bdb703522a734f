"""Ranks that hold shards of the same shapes, so that one of them can stand for all."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.plan.sight import Sight
from shardwise.plan.wanted import WantedTensor


def rank_classes(
    wanted: Sequence[WantedTensor], sight: Sight, *, most_pieces: int
) -> tuple[tuple[int, ...], ...]:
    """Return the ranks in classes, each in order; a small job's ranks are classes of their own.

    Args:
        wanted: The tensors.
        sight: Of their source.
        most_pieces: How many pieces of tensors, times ranks, may be looked at one by one.
    """
    if len(sight.ranks) * sum(len(tensor.pieces) for tensor in wanted) <= most_pieces:
        return tuple((rank,) for rank in sight.ranks)
    kinds = {(id(tensor.layout), tensor.shape): tensor for tensor in wanted}.values()
    # Pages that several ranks of a node map are counted by the first of them.
    shared = {id(t.layout): t.layout for t in wanted if t.may_map and t.layout.copies > 1}.values()
    classes: dict[tuple[object, ...], list[int]] = {}
    for rank in sight.ranks:
        shapes = tuple(tensor.layout.local_shape(tensor.shape, rank) for tensor in kinds)
        counts = tuple(
            next(r for r in layout.replicas(rank) if sight.node_of.get(r) == sight.node_of[rank]) == rank
            for layout in shared
        )
        # The first rank's parts begin where tensors do, and may lie next to each other.
        classes.setdefault((rank == sight.ranks[0], shapes, counts), []).append(rank)
    return tuple(tuple(members) for members in classes.values())
