"""The rank0 route as data: which piece of which tensor goes to which rank in which bucket.

There are two kinds of bucket. A packed bucket has a slot for every rank, which that rank's regions fill in the order of
the tensors; a region larger than what is left of a slot is cut along its rows. So small tensors travel together. A
direct bucket is a part of one large tensor of which all ranks own equal runs of rows: it goes from the source's tensor
into the shards without being packed. No bucket of either kind exceeds the staging size, and the plan is the same on all
ranks because it is computed from names, shapes, dtypes and layouts alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardwise.errors import ConfigurationError
from shardwise.plan.boxes import ALIGNMENT_BYTES, aligned, split_region
from shardwise.plan.layout import Layout
from shardwise.tensors import Region, TensorSpec

BUCKETS_IN_FLIGHT = 2


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
class DirectBucket:
    """A part of one tensor that one collective moves from where it is to where it stays.

    Args:
        tensor: Index into `ScatterPlan.tensors`.
        regions: For each rank, in the order of `ScatterPlan.ranks`, whole rows of the full tensor, in elements; all of
            one shape. The source rank's own part is among them.
    """

    tensor: int
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScatterPlan:
    """The whole transfer from the source rank's state to all other ranks.

    Args:
        tensors: In the order in which they travel.
        ranks: Global ranks in the order of the slots.
        source_rank: Global rank that holds the full tensors; its own regions do not travel.
        slot_bytes: Size of a slot, the same in all packed buckets.
        buckets: In the order in which they travel: direct ones, then packed ones.
        bytes_to_rank: Payload for each of `ranks`, padding not counted, in bytes.
    """

    tensors: tuple[PlannedTensor, ...]
    ranks: tuple[int, ...]
    source_rank: int
    slot_bytes: int
    buckets: tuple[Bucket | DirectBucket, ...]
    bytes_to_rank: tuple[int, ...]

    @property
    def network_bytes(self) -> int:
        """Payload that leaves the source rank, in bytes."""
        return sum(self.bytes_to_rank)

    @property
    def last_bucket_of_tensor(self) -> dict[int, int]:
        """Index of the last bucket that carries a piece of each tensor; tensors that never travel are absent."""
        last: dict[int, int] = {}
        for index, bucket in enumerate(self.buckets):
            if isinstance(bucket, DirectBucket):
                last[bucket.tensor] = index
            else:
                last.update((piece.tensor, index) for slot in bucket.slots for piece in slot)
        return last


def plan_scatter(
    tensors: Sequence[PlannedTensor],
    *,
    ranks: Sequence[int],
    source_rank: int,
    staging_bytes: int,
    direct_from_bytes: int | None,
) -> ScatterPlan:
    """Plan how the source rank's full tensors reach the other ranks.

    Args:
        tensors: In the order in which they should travel.
        ranks: Global ranks that take part.
        source_rank: The one that holds the full tensors.
        staging_bytes: Bound of all slots that the source fills at a time, two buckets in flight, in bytes.
        direct_from_bytes: Smallest region, in bytes, that travels in direct buckets; None packs everything, for ranks
            whose shards are not where the collective's buffers are.

    Returns:
        The plan, equal on every rank that passes equal arguments.

    Raises:
        ConfigurationError: `staging_bytes` leaves no room for one element per rank, or the source is not in `ranks`.
    """
    if source_rank not in ranks:
        raise ConfigurationError(
            f"scatter plan: source rank {source_rank} is not one of the ranks {tuple(ranks)}"
        )
    limit = staging_bytes // (BUCKETS_IN_FLIGHT * len(ranks)) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    if limit < ALIGNMENT_BYTES:
        needed = BUCKETS_IN_FLIGHT * len(ranks) * ALIGNMENT_BYTES
        raise ConfigurationError(
            f"staging_bytes: expected at least {needed} for {len(ranks)} ranks, got {staging_bytes}"
        )
    owned = [tuple(tensor.layout.region(tensor.spec.shape, rank) for rank in ranks) for tensor in tensors]
    straight = {
        index
        for index, tensor in enumerate(tensors)
        if len(ranks) > 1 and _goes_straight(tensor.spec, owned[index], direct_from_bytes)
    }
    direct = [
        bucket
        for index in sorted(straight)
        for bucket in _direct_buckets(tensors, index, owned[index], limit)
    ]
    streams: list[list[tuple[Piece, ...]]] = []
    payloads: list[int] = []
    for position, rank in enumerate(ranks):
        regions = [] if rank == source_rank else [parts[position] for parts in owned]
        packed = [None if index in straight else region for index, region in enumerate(regions)]
        streams.append(list(_fill_slots(tuple(_pieces(packed, tensors, limit)), tensors, limit)))
        payloads.append(
            sum(
                region.numel * tensors[index].spec.dtype.itemsize
                for index, region in enumerate(regions)
                if region is not None
            )
        )
    packed_buckets = tuple(
        Bucket(slots=tuple(stream[index] if index < len(stream) else () for stream in streams))
        for index in range(max(len(stream) for stream in streams))
    )
    return ScatterPlan(
        tensors=tuple(tensors),
        ranks=tuple(ranks),
        source_rank=source_rank,
        slot_bytes=_largest_slot_bytes(packed_buckets, tensors),
        buckets=(*direct, *packed_buckets),
        bytes_to_rank=tuple(payloads),
    )


def _goes_straight(spec: TensorSpec, regions: Sequence[Region | None], direct_from_bytes: int | None) -> bool:
    first = regions[0]
    if direct_from_bytes is None or first is None or not spec.shape:
        return False
    if first.numel * spec.dtype.itemsize < direct_from_bytes or first.shape == spec.shape:
        return False
    return all(
        region is not None and region.shape == first.shape and region.shape[1:] == spec.shape[1:]
        for region in regions
    )


def _direct_buckets(
    tensors: Sequence[PlannedTensor], index: int, regions: Sequence[Region | None], limit: int
) -> Iterator[DirectBucket]:
    max_numel = limit // tensors[index].spec.dtype.itemsize
    # A row that is larger than a bucket is cut within; either way each part is contiguous.
    parts = [split_region(region, max_numel=max_numel) for region in regions if region is not None]
    yield from (DirectBucket(tensor=index, regions=of_ranks) for of_ranks in zip(*parts, strict=True))


def _pieces(
    regions: Sequence[Region | None], tensors: Sequence[PlannedTensor], limit: int
) -> Iterator[Piece]:
    for index, region in enumerate(regions):
        if region is None or region.numel == 0:
            continue
        for part in split_region(region, max_numel=limit // tensors[index].spec.dtype.itemsize):
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
        used = aligned(used + size)
    if slot:
        yield tuple(slot)


def _largest_slot_bytes(buckets: Sequence[Bucket], tensors: Sequence[PlannedTensor]) -> int:
    ends = (
        slot[-1].offset_bytes + slot[-1].region.numel * tensors[slot[-1].tensor].spec.dtype.itemsize
        for bucket in buckets
        for slot in bucket.slots
        if slot
    )
    return aligned(max(ends, default=0))
