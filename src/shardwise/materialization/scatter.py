"""Execute a scatter plan: the source rank packs buckets, every other rank unpacks its slot into its shards."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

from shardwise.checkpoint import StateDictSource
from shardwise.materialization.data_plane import DataPlane
from shardwise.materialization.device_placing import device_of_targets
from shardwise.materialization.pinned import PinnedMemory
from shardwise.plan import BUCKETS_IN_FLIGHT, Bucket, DirectBucket, Piece, ScatterPlan
from shardwise.tensors import Region


class Scatter:
    """One rank's part in a scatter plan.

    Args:
        plan: The same on all ranks.
        source: Full tensors on the source rank; empty elsewhere.
        targets: This rank's shards by tensor name, each of its region's shape; tensors it owns none of are absent.
        rank: This rank, global.
        device: Of the staging buffers.
    """

    def __init__(
        self,
        plan: ScatterPlan,
        *,
        source: StateDictSource,
        targets: Mapping[str, torch.Tensor],
        rank: int,
        device: torch.device,
    ) -> None:
        self._plan = plan
        self._source = source
        self._targets = targets
        self._rank = rank
        self._position = plan.ranks.index(rank)
        self._is_source = rank == plan.source_rank
        slots = len(plan.ranks) if self._is_source else 1
        packed = sum(isinstance(bucket, Bucket) for bucket in plan.buckets)
        in_flight = min(BUCKETS_IN_FLIGHT, packed)
        self._ring = [
            torch.empty(slots, plan.slot_bytes, dtype=torch.uint8, device=device) for _ in range(in_flight)
        ]
        # On the source rank a device's buckets are packed in host memory, and copied as one: a copy for each piece would wait for the
        # device each time.
        self._packing: PinnedMemory | None = None
        if self._is_source and device.type != "cpu" and packed and self._is_on_host():
            self._packing = PinnedMemory(slots * plan.slot_bytes, device=device, threads=1, cpus=None)
        self._destination = device_of_targets(targets)
        self._regions: dict[int, Region] = {}
        last = plan.last_bucket_of_tensor if self._is_source else {}
        self._ending_with: dict[int, list[int]] = {}
        for tensor, bucket in last.items():
            self._ending_with.setdefault(bucket, []).append(tensor)
        self._travels = frozenset(last)

    def run(self, plane: DataPlane | None) -> None:
        """Move everything.

        Args:
            plane: Carries the buckets; None where nothing travels.
        """
        try:
            self._run(plane)
        finally:
            if self._packing is not None:
                self._packing.close()

    def _run(self, plane: DataPlane | None) -> None:
        if self._is_source:
            stays = [t for t in range(len(self._plan.tensors)) if t not in self._travels]
            self._keep_own_regions(stays)
        if plane is None:
            return
        in_flight: deque[tuple[int, dist.Work]] = deque()
        for index, bucket in enumerate(self._plan.buckets):
            if len(in_flight) == BUCKETS_IN_FLIGHT:
                self._finish(plane, *in_flight.popleft())
            if isinstance(bucket, DirectBucket):
                work = self._start_direct(plane, bucket)
            else:
                work = self._start_packed(plane, index, bucket)
            in_flight.append((index, work))
        while in_flight:
            self._finish(plane, *in_flight.popleft())

    def _start_direct(self, plane: DataPlane, bucket: DirectBucket) -> dist.Work:
        fqn = self._plan.tensors[bucket.tensor].spec.fqn
        where = bucket.regions[self._position].relative_to(self._region_of(bucket.tensor))
        slots = None
        if self._is_source:
            slots = [_as_bytes(self._source.tensor(fqn)[region.slices()]) for region in bucket.regions]
        return plane.scatter(
            _as_bytes(self._targets[fqn][where.slices()]), slots, source_rank=self._plan.source_rank
        )

    def _start_packed(self, plane: DataPlane, index: int, bucket: Bucket) -> dist.Work:
        buffer = self._ring[index % len(self._ring)]
        if not self._is_source:
            return plane.scatter(buffer[0], None, source_rank=self._plan.source_rank)
        slots = buffer if self._packing is None else self._packing.bytes.view(buffer.shape)
        for position, pieces in enumerate(bucket.slots):
            for piece in pieces:
                spec = self._plan.tensors[piece.tensor].spec
                self._source.read(spec.fqn, piece.region, self._staged(slots[position], piece))
        if slots is not buffer:
            buffer.copy_(slots)
        work = plane.scatter(buffer[self._position], list(buffer), source_rank=self._plan.source_rank)
        self._keep_own_regions(self._ending_with.get(index, ()))
        return work

    def _finish(self, plane: DataPlane, index: int, work: dist.Work) -> None:
        plane.wait(work, what=f"bucket {index + 1} of {len(self._plan.buckets)} from the source rank")
        bucket = self._plan.buckets[index]
        if isinstance(bucket, DirectBucket):
            for tensor in self._ending_with.get(index, ()):
                self._source.release(self._plan.tensors[tensor].spec.fqn)
        elif not self._is_source:
            slot = self._ring[index % len(self._ring)][0]
            buffer = slot.to(self._destination)  # at once, where it is elsewhere
            for piece in bucket.slots[self._position]:
                target = self._targets[self._plan.tensors[piece.tensor].spec.fqn]
                where = piece.region.relative_to(self._region_of(piece.tensor))
                with torch.no_grad():
                    target[where.slices()].copy_(self._staged(buffer, piece))

    def _keep_own_regions(self, tensors: Iterable[int]) -> None:
        # The source lets go of each full tensor as soon as its last piece has left, so that its memory shrinks
        # while its shards grow.
        for index in tensors:
            fqn = self._plan.tensors[index].spec.fqn
            if fqn in self._targets:
                self._source.read(fqn, self._region_of(index), self._targets[fqn])
            self._source.release(fqn)

    def _is_on_host(self) -> bool:
        return all(
            self._source.tensor(planned.spec.fqn).device.type == "cpu" for planned in self._plan.tensors
        )

    def _region_of(self, tensor: int) -> Region:
        if tensor not in self._regions:
            planned = self._plan.tensors[tensor]
            region = planned.layout.region(planned.spec.shape, self._rank)
            self._regions[tensor] = region if region is not None else Region.whole((0,))
        return self._regions[tensor]

    def _staged(self, slot: torch.Tensor, piece: Piece) -> torch.Tensor:
        dtype = self._plan.tensors[piece.tensor].spec.dtype
        size = math.prod(piece.region.shape) * dtype.itemsize
        return slot[piece.offset_bytes : piece.offset_bytes + size].view(dtype).view(piece.region.shape)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
