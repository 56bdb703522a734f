"""Whether a plan brings every element of this rank's shards, no fewer and no more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from shardwise.errors import CheckpointError
from shardwise.plan.load_plan import ReadPlan
from shardwise.plan.wanted import WantedTensor


def arriving_directly(plan: ReadPlan, wanted: Iterable[WantedTensor]) -> dict[str, int]:
    """Return how many elements of each shard are mapped or read by this rank for itself, by fqn."""
    itemsize = {tensor.fqn: tensor.dtype.itemsize for tensor in wanted}
    found = {item.fqn: item.nbytes // itemsize[item.fqn] for item in plan.mapped}
    for read in plan.reads:
        for fragment in read.fragments:
            found[fragment.fqn] = found.get(fragment.fqn, 0) + fragment.piece.numel
    return found


def require_covered(
    wanted: Iterable[WantedTensor], arriving: Iterable[Mapping[str, int]], *, rank: int, name: str
) -> None:
    """Raise unless every shard of a rank gets as many elements as it has; called before anything is read.

    Args:
        wanted: The tensors.
        arriving: Elements by fqn, once for each way that they take.
        rank: Global rank.
        name: Of the source, for the message.

    Raises:
        CheckpointError: Naming the first shard that would be left incomplete, or be written twice.
    """
    found: dict[str, int] = {}
    for of_way in arriving:
        for fqn, elements in of_way.items():
            found[fqn] = found.get(fqn, 0) + elements
    for tensor in wanted:
        shape = tensor.layout.local_shape(tensor.shape, rank)
        expected = math.prod(shape) if shape is not None else 0
        if tensor.partial:
            expected = sum(each.piece.numel for each in tensor.pieces_on(rank))
        if found.get(tensor.fqn, 0) != expected:
            raise CheckpointError(
                f"{tensor.fqn}: expected {expected} elements of {name} for the shard {shape} of rank {rank}, got a plan that "
                f"brings {found.get(tensor.fqn, 0)} ({tensor.layout.placements} on a mesh of shape "
                f"{tensor.layout.mesh_shape}). Nothing was read. Fill parts that lie on different meshes in calls of their own, "
                "with group=, and report this layout to shardwise."
            )
