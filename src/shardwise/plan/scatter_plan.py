"""The rank0 route as data: which piece of which tensor goes to which rank in which bucket.

Every rank has a slot in each bucket. A rank's regions fill its slots in the order of the tensors; a region larger
than what is left of a slot is cut along its rows. So no bucket exceeds the staging size, small tensors travel
together, and the plan is the same on all ranks because it is computed from names, shapes, dtypes and layouts alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardwise.errors import ConfigurationError
from shardwise.plan.layout import Layout
from shardwise.tensors import Region, TensorSpec

ALIGNMENT_BYTES = (
    16  # every element size divides it, so that any piece of a slot can be viewed in its own dtype
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """A full tensor on the source and how it lies over the ranks."""

    spec: TensorSpec
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of one rank's region of one tensor, at a place in that rank's slot.

    Args:
        tensor: Index into `ScatterPlan.tensors`.
        region: In the full tensor, in elements.
        offset_bytes: In the slot; a multiple of `ALIGNMENT_BYTES`.
    """

    tensor: int
    region: Region
    offset_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """What one collective moves: for each rank, in the order of `ScatterPlan.ranks`, the pieces of its slot."""

    slots: tuple[tuple[Piece, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScatterPlan:
    """The whole transfer from the source rank's state to all other ranks.

    Args:
        tensors: In the order in which they travel.
        ranks: Global ranks in the order of the slots.
        source_rank: Global rank that holds the full tensors; its own regions do not travel.
        slot_bytes: Size of a slot, the same in all buckets.
        buckets: In order.
        bytes_to_rank: Payload for each of `ranks`, padding not counted, in bytes.
    """

    tensors: tuple[PlannedTensor, ...]
    ranks: tuple[int, ...]
    source_rank: int
    slot_bytes: int
    buckets: tuple[Bucket, ...]
    bytes_to_rank: tuple[int, ...]

    @property
    def network_bytes(self) -> int:
        """Payload that leaves the source rank, in bytes."""
        return sum(self.bytes_to_rank)

    @property
    def last_bucket_of_tensor(self) -> dict[int, int]:
        """Index of the last bucket that carries a piece of each tensor; tensors that never travel are absent."""
        return {
            piece.tensor: index
            for index, bucket in enumerate(self.buckets)
            for slot in bucket.slots
            for piece in slot
        }


def plan_scatter(
    tensors: Sequence[PlannedTensor], *, ranks: Sequence[int], source_rank: int, staging_bytes: int
) -> ScatterPlan:
    """Plan how the source rank's full tensors reach the other ranks.

    Args:
        tensors: In the order in which they should travel.
        ranks: Global ranks that take part.
        source_rank: The one that holds the full tensors.
        staging_bytes: Bound of all slots that the source fills at a time, two buckets in flight, in bytes.

    Returns:
        The plan, equal on every rank that passes equal arguments.

    Raises:
        ConfigurationError: `staging_bytes` leaves no room for one element per rank, or the source is not in `ranks`.
    """
    if source_rank not in ranks:
        raise ConfigurationError(
            f"scatter plan: source rank {source_rank} is not one of the ranks {tuple(ranks)}"
        )
    limit = staging_bytes // (2 * len(ranks)) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    if limit < ALIGNMENT_BYTES:
        needed = 2 * len(ranks) * ALIGNMENT_BYTES
        raise ConfigurationError(
            f"staging_bytes: expected at least {needed} for {len(ranks)} ranks, got {staging_bytes}"
        )
    streams: list[list[tuple[Piece, ...]]] = []
    payloads: list[int] = []
    for rank in ranks:
        pieces = () if rank == source_rank else tuple(_pieces_of_rank(tensors, rank, limit))
        streams.append(list(_fill_slots(pieces, tensors, limit)))
        payloads.append(sum(p.region.numel * tensors[p.tensor].spec.dtype.itemsize for p in pieces))
    count = max(len(stream) for stream in streams)
    buckets = tuple(
        Bucket(slots=tuple(stream[index] if index < len(stream) else () for stream in streams))
        for index in range(count)
    )
    return ScatterPlan(
        tensors=tuple(tensors),
        ranks=tuple(ranks),
        source_rank=source_rank,
        slot_bytes=_largest_slot_bytes(buckets, tensors),
        buckets=buckets,
        bytes_to_rank=tuple(payloads),
    )


def _pieces_of_rank(tensors: Sequence[PlannedTensor], rank: int, limit: int) -> Iterator[Piece]:
    for index, tensor in enumerate(tensors):
        region = tensor.layout.region(tensor.spec.shape, rank)
        if region is None or region.numel == 0:
            continue
        for part in split_region(region, max_numel=limit // tensor.spec.dtype.itemsize):
            yield Piece(tensor=index, region=part, offset_bytes=0)


def _fill_slots(
    pieces: Sequence[Piece], tensors: Sequence[PlannedTensor], limit: int
) -> Iterator[tuple[Piece, ...]]:
    slot: list[Piece] = []
    used = 0
    for piece in pieces:
        size = piece.region.numel * tensors[piece.tensor].spec.dtype.itemsize
        if used + size > limit:
            yield tuple(slot)
            slot, used = [], 0
        slot.append(Piece(tensor=piece.tensor, region=piece.region, offset_bytes=used))
        used = _aligned(used + size)
    if slot:
        yield tuple(slot)


def _largest_slot_bytes(buckets: Sequence[Bucket], tensors: Sequence[PlannedTensor]) -> int:
    ends = (
        slot[-1].offset_bytes + slot[-1].region.numel * tensors[slot[-1].tensor].spec.dtype.itemsize
        for bucket in buckets
        for slot in bucket.slots
        if slot
    )
    return _aligned(max(ends, default=0))


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def split_region(region: Region, *, max_numel: int) -> Iterator[Region]:
    """Cut a region into parts of at most `max_numel` elements, by rows where a row fits, else within rows."""
    if region.numel <= max_numel:
        yield region
        return
    dim = next(d for d, size in enumerate(region.shape) if size > 1)
    inner = math.prod(region.shape[dim + 1 :])
    step = max(1, max_numel // inner)
    for low in range(region.start[dim], region.stop[dim], step):
        high = min(low + step, region.stop[dim])
        part = Region(
            start=(*region.start[:dim], low, *region.start[dim + 1 :]),
            stop=(*region.stop[:dim], high, *region.stop[dim + 1 :]),
        )
        yield from split_region(part, max_numel=max_numel)
