"""Execute a load plan: read extents on threads, place what they hold."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from shardwise.checkpoint import Source
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.staging import StagingRing
from shardwise.plan import Fragment, LoadPlan, Read

_MOST_THREADS = 8
_POLL_SECONDS = 0.25


def read_threads() -> int:
    """Return how many reads are in flight: enough to keep a disk busy, few on a small machine."""
    return min(_MOST_THREADS, 2 * len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)


def as_memory(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor in host memory, writable."""
    array: Any = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def placed(
    staged: torch.Tensor, fragment_offset: int, dtype: torch.dtype, fragment: Fragment
) -> torch.Tensor:
    """Return a fragment's elements inside of a staging buffer."""
    return strided_view(
        staged, fragment_offset, dtype, fragment.local.shape, fragment.strides, fragment.stop - fragment.start
    )


def strided_view(
    staged: torch.Tensor,
    offset: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    nbytes: int,
) -> torch.Tensor:
    """Return elements that lie in a byte buffer from an offset on.

    Args:
        staged: uint8, contiguous.
        offset: Of the first element, in bytes.
        dtype: Of the elements.
        shape: Of the result.
        strides: In elements.
        nbytes: From the first byte of the first element to the last byte of the last.
    """
    run = staged[offset : offset + nbytes]
    if run.storage_offset() % dtype.itemsize:
        run = run.clone()  # a header of odd length leaves the elements where torch cannot view them
    return run.view(dtype).as_strided(shape, strides)


class Reading:
    """One rank's reads.

    Args:
        plan: Of this rank.
        source: Open.
        dtypes: As stored in the source, by tensor name.
        ring: Staging.
        agreement: Of the call; asked for failures of other ranks while reads are awaited.
        done: Told the bytes of each completed read.
        place: Takes each fragment and its elements, in a staging buffer that is reused after the call.
        in_place: Returns where the bytes of a read belong as they are, or None; those need no buffer.
    """

    def __init__(
        self,
        plan: LoadPlan,
        *,
        source: Source,
        dtypes: Mapping[str, torch.dtype],
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
        self._dtypes = dtypes
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
                offset = fragment.start - read.start
                self._place(fragment, placed(buffer, offset, self._dtypes[fragment.fqn], fragment))
            self._ring.give_back(buffer)
        self._done(read.nbytes)


class Shards:
    """This rank's shards as the destination of reads.

    Args:
        targets: By tensor name.
        dtypes: As stored in the source, by tensor name.
    """

    def __init__(self, targets: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
        self._targets = targets
        self._dtypes = dtypes

    def place(self, fragment: Fragment, elements: torch.Tensor) -> None:
        """Copy a fragment into its shard, cast to the shard's dtype."""
        with torch.no_grad():
            self._targets[fragment.fqn][fragment.local.slices()].copy_(elements, non_blocking=True)

    def in_place(self, read: Read) -> memoryview | None:
        """Return where a read's bytes belong as they are, if they do."""
        if len(read.fragments) > 1:
            return None
        fragment = read.fragments[0]
        target = self._targets[fragment.fqn]
        if target.device.type != "cpu" or target.dtype != self._dtypes[fragment.fqn]:
            return None
        part = target[fragment.local.slices()]
        if not part.is_contiguous() or part.numel() * part.element_size() != read.nbytes:
            return None
        return as_memory(part)
