"""Execute a load plan: read extents on threads, place what they hold."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from shardwise.checkpoint import Source
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.placing import as_memory, elements_in, place_in
from shardwise.materialization.staging import StagingRing
from shardwise.plan import Fragment, Read, ReadPlan

_MOST_THREADS = 8
_POLL_SECONDS = 0.25


def read_threads() -> int:
    """Return how many reads are in flight: enough to keep a disk busy, few on a small machine."""
    return min(_MOST_THREADS, 2 * len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)


class Reading:
    """One rank's reads.

    Args:
        plan: Of this rank.
        source: Open.
        ring: Staging.
        agreement: Of the call; asked for failures of other ranks while reads are awaited.
        done: Told the bytes of each completed read.
        place: Takes each fragment and its elements, in a staging buffer that is reused after the call.
        in_place: Returns where the bytes of a read belong as they are, or None; those need no buffer.
    """

    def __init__(
        self,
        plan: ReadPlan,
        *,
        source: Source,
        ring: StagingRing,
        agreement: Agreement,
        done: Callable[[int], None],
        place: Callable[[Fragment, torch.Tensor], None],
        in_place: Callable[[Read], memoryview | None] | None,
    ) -> None:
        self._plan = plan
        self._source = source
        self._place = place
        self._in_place = in_place
        self._ring = ring
        self._agreement = agreement
        self._done = done

    def run(self) -> None:
        """Read everything and place it.

        Raises:
            CheckpointError: A read failed.
            PeerError: Another rank failed.
        """
        if not self._plan.reads:
            return
        threads = read_threads()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="shardwise-read")
        in_flight: deque[tuple[Read, torch.Tensor | None, Future[None]]] = deque()
        try:
            for read in self._plan.reads:
                in_place = self._in_place(read) if self._in_place is not None else None
                while len(in_flight) >= 2 * threads or (in_place is None and not self._ring.available):
                    self._finish(*in_flight.popleft())
                buffer = None if in_place is not None else self._ring.take()
                memory = in_place if in_place is not None else as_memory(buffer[: read.nbytes])  # type: ignore[index]
                in_flight.append(
                    (read, buffer, pool.submit(self._source.read_into, read.file, read.start, memory))
                )
            while in_flight:
                self._finish(*in_flight.popleft())
        finally:
            # Reads that have started write into shards and buffers: they end before these can go.
            pool.shutdown(wait=True, cancel_futures=True)

    def _finish(self, read: Read, buffer: torch.Tensor | None, future: Future[None]) -> None:
        while not wait([future], timeout=_POLL_SECONDS).done:
            self._agreement.check()
        future.result()
        if buffer is not None:
            for fragment in read.fragments:
                elements = elements_in(
                    buffer, fragment.start - read.start, fragment.stored.dtype, fragment.piece
                )
                self._place(fragment, elements)
            self._ring.give_back(buffer)
        self._done(read.nbytes)


class Shards:
    """This rank's shards as the destination of reads.

    Args:
        targets: By tensor name.
    """

    def __init__(self, targets: Mapping[str, torch.Tensor]) -> None:
        self._targets = targets

    def place(self, fragment: Fragment, elements: torch.Tensor) -> None:
        """Copy a fragment into its shard, cast to the shard's dtype."""
        with torch.no_grad():
            place_in(self._targets[fragment.fqn], fragment.piece).copy_(elements, non_blocking=True)

    def in_place(self, read: Read) -> memoryview | None:
        """Return where a read's bytes belong as they are, if they do."""
        if len(read.fragments) > 1:
            return None
        fragment = read.fragments[0]
        target = self._targets[fragment.fqn]
        if (
            target.device.type != "cpu"
            or target.dtype != fragment.stored.dtype
            or not fragment.piece.is_one_run
        ):
            return None
        place = place_in(target, fragment.piece)
        return as_memory(place) if place.is_contiguous() else None
