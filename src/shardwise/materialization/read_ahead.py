"""Extents read one after the other on a thread, the next one while the last one is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from shardwise.materialization.awaited_source import AwaitedSource
from shardwise.materialization.placing import as_memory
from shardwise.plan import Extent, Slice


class ReadAhead:
    """Hands out slices in the order of their extents; two extents are in memory at a time.

    Args:
        extents: In the order in which their slices are wanted.
        source: Open; waits for reads that have begun when it is left.
        pinned: Whether the buffers lie in pinned host memory.
        done: Told the bytes of each extent read.
    """

    def __init__(
        self,
        extents: Sequence[Extent],
        *,
        source: AwaitedSource,
        pinned: bool,
        done: Callable[[int], None],
    ) -> None:
        self._extents: Iterator[Extent] = iter(extents)
        self._source = source
        self._done = done
        longest_bytes = max((extent.nbytes for extent in extents), default=0)
        self._buffers = [
            GrowingBuffer(torch.device("cpu"), pinned=pinned, expected_bytes=longest_bytes) for _ in range(2)
        ]
        self._next: tuple[Extent, torch.Tensor, Callable[[], None]] | None = None
        self._current: tuple[Extent, torch.Tensor] | None = None
        self._start()

    def content_of(self, read: Slice) -> torch.Tensor:
        """Return the bytes of a slice; they are valid until the next call.

        Raises:
            CheckpointError: The read failed.
            PeerError: Another rank failed.
            StalledReadError: The read hangs.
        """
        if self._current is None or not _holds(self._current[0], read):
            self._advance()
        if self._current is None or not _holds(self._current[0], read):
            raise RuntimeError(f"the slice at {read.start} of {read.file} is not the next one")
        extent, content = self._current
        return content[read.start - extent.start : read.stop - extent.start]

    def _advance(self) -> None:
        if self._next is None:
            return
        extent, content, await_read = self._next
        await_read()
        self._done(extent.nbytes)
        self._current = extent, content
        self._start()

    def _start(self) -> None:
        extent = next(self._extents, None)
        if extent is None:
            self._next = None
            return
        self._buffers.reverse()  # the other one is in use
        content = self._buffers[0].first(extent.nbytes)
        self._next = extent, content, self._source.begin(extent.file, extent.start, as_memory(content))


def _holds(extent: Extent, read: Slice) -> bool:
    return extent.file == read.file and extent.start <= read.start and read.stop <= extent.stop


class GrowingBuffer:
    """Bytes that are used again and again; nothing is allocated before the first use.

    A buffer that grows step by step leaves holes in the heap that nothing fits in.

    Args:
        device: Of the bytes.
        pinned: Whether they lie in pinned host memory.
        expected_bytes: Most that will be wanted; more is possible.
    """

    def __init__(self, device: torch.device, *, pinned: bool, expected_bytes: int) -> None:
        self._device = device
        self._pinned = pinned
        self._expected_bytes = expected_bytes
        self._bytes = self._made(0)

    def first(self, nbytes: int) -> torch.Tensor:
        """Return the first bytes of it; what they hold is undefined."""
        if nbytes > len(self._bytes):
            self._bytes = self._made(0)  # the two never live together
            self._bytes = self._made(max(nbytes, self._expected_bytes))
        return self._bytes[:nbytes]

    def _made(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned, device=self._device)
