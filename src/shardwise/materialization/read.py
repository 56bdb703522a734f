"""Execute a load plan: read extents on threads, place what they hold."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future

import torch

from shardwise.checkpoint import Source, read_scattered
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.awaited_call import Doing, await_call, calling_threads
from shardwise.materialization.cpus import device_read_threads, usable_of
from shardwise.materialization.device_placing import DevicePlacing
from shardwise.materialization.landings import Landing
from shardwise.materialization.left_behind import leave_behind
from shardwise.materialization.placing import ShardMemory, as_memory, elements_in, place_in
from shardwise.materialization.reader_threads import ReaderThreads
from shardwise.materialization.staging import StagingRing
from shardwise.plan import Fragment, Read, ReadPlan

_MOST_THREADS = 8
_MOST_BYTES = 16 * 2**20
"""Of one request: enough for any disk, little enough for several threads to share the work."""


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
        place: Takes what a read holds out of its staging buffer, which is reused after the event that it returns; None: at once.
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
        place: Callable[[Read, torch.Tensor], torch.Event | None],
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
        count, cpus = read_threads(), self._ring.cpus
        if self._ring.is_pinned:
            count = device_read_threads(cpus=usable_of(cpus), environ=os.environ)
        in_flight: deque[_Request] = deque()
        try:
            with calling_threads(count, name="shardwise-read", cpus=cpus) as threads:
                for request in self._requests():
                    # What has been read is copied while the rest is: the device must not wait for this thread, which may wait for
                    # a buffer next.
                    while self._ring.is_pinned and in_flight and in_flight[0].future.done():
                        self._finish(in_flight[0])
                        in_flight.popleft()
                    while len(in_flight) >= 2 * count or (request.is_staged and not self._ring.available):
                        self._finish(in_flight[0])
                        in_flight.popleft()
                    request.start(threads, self._source, self._ring)
                    in_flight.append(request)
                while in_flight:
                    self._finish(in_flight[0])
                    in_flight.popleft()
        except BaseException:
            for request in in_flight:
                if not request.is_staged:
                    leave_behind(request.future, self._described(request), request.parts)
            raise

    def _requests(self) -> Iterator[_Request]:
        """Join reads that follow each other in a file and go straight into place, each to its own."""
        pending = _Request()
        most_bytes = min(_MOST_BYTES, self._ring.count * self._ring.nbytes)
        for read in self._plan.reads:
            memory = self._in_place(read) if self._in_place is not None else None
            if pending.reads and (memory is None or not pending.is_followed_by(read, most_bytes)):
                yield pending
                pending = _Request()
            pending.reads.append(read)
            if memory is None:
                yield pending
                pending = _Request()
            else:
                pending.parts.append(memory)
        if pending.reads:
            yield pending

    def _described(self, request: _Request) -> str:
        return f"{self._source.name}, {request.file}: reading {request.nbytes:,} bytes at byte {request.start_byte:,}"

    def _finish(self, request: _Request) -> None:
        await_call(request.future, self._agreement, Doing(self._described(request)))
        if request.buffer is not None:
            (read,) = request.reads
            self._ring.give_back(request.buffer, copied=self._place(read, request.buffer))
        self._done(request.nbytes)


class _Request:
    """Bytes of one file that are asked for at once: one read through staging, or several that go straight into place."""

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self.parts: list[memoryview] = []
        self.buffer: torch.Tensor | None = None
        self.future: Future[None] = Future()

    @property
    def is_staged(self) -> bool:
        """Whether it needs a staging buffer."""
        return not self.parts

    @property
    def file(self) -> str:
        """Within the source."""
        return self.reads[0].file

    @property
    def start_byte(self) -> int:
        """First byte in the file."""
        return self.reads[0].start

    @property
    def nbytes(self) -> int:
        """Bytes asked for."""
        return self.reads[-1].stop - self.reads[0].start

    def is_followed_by(self, read: Read, most_bytes: int) -> bool:
        """Return whether a read may be asked for together with this."""
        last = self.reads[-1]
        return (read.file, read.start) == (last.file, last.stop) and self.nbytes + read.nbytes <= most_bytes

    def start(self, threads: ReaderThreads, source: Source, ring: StagingRing) -> None:
        """Begin to read on a thread."""
        if self.is_staged:
            self.buffer = ring.take()
            self.parts = [as_memory(self.buffer[: self.nbytes])]
        self.future = threads.submit(read_scattered, source, self.file, self.start_byte, self.parts)


def fragment_by_fragment(
    place: Callable[[Fragment, torch.Tensor], None],
) -> Callable[[Read, torch.Tensor], None]:
    """Return what takes a read's fragments out of its buffer one after the other.

    Args:
        place: Takes each fragment and its elements, which are gone after the call.
    """

    def place_all(read: Read, buffer: torch.Tensor) -> None:
        for fragment in read.fragments:
            offset = fragment.start - read.start
            place(fragment, elements_in(buffer, offset, fragment.stored.dtype, fragment.piece))

    return place_all


def landings_of(read: Read) -> list[Landing]:
    """Return what the buffer of a read holds."""
    return [
        Landing(
            fqn=fragment.fqn,
            dtype=fragment.stored.dtype,
            piece=fragment.piece,
            offset=fragment.start - read.start,
            is_packed=False,
        )
        for fragment in read.fragments
    ]


class Shards:
    """This rank's shards as the destination of reads.

    Args:
        targets: By tensor name.
        placing: Of those on a device; None where all are in host memory.
    """

    def __init__(self, targets: Mapping[str, torch.Tensor], *, placing: DevicePlacing | None) -> None:
        self._targets = targets
        self._placing = placing
        self._memory = ShardMemory(targets)
        self._place_here = fragment_by_fragment(self._place_fragment)

    def place(self, read: Read, buffer: torch.Tensor) -> torch.Event | None:
        """Copy what a read holds into its shards, cast to their dtypes.

        Returns:
            Reached when the buffer may be written again; None: at once.
        """
        if self._placing is not None:
            return self._placing.place(buffer, landings_of(read))
        return self._place_here(read, buffer)

    def in_place(self, read: Read) -> memoryview | None:
        """Return where a read's bytes belong as they are, if they do."""
        return self._memory.of(read.fragments[0]) if len(read.fragments) == 1 else None

    def _place_fragment(self, fragment: Fragment, elements: torch.Tensor) -> None:
        with torch.no_grad():
            place_in(self._targets[fragment.fqn], fragment.piece).copy_(elements)
