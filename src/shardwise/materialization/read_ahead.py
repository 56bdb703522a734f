"""Extents read one after the other on a thread, the next one while the last one is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from shardwise.materialization.awaited_source import AwaitedSource
from shardwise.materialization.pinned import PinnedMemory
from shardwise.materialization.placing import as_memory
from shardwise.plan import Extent, Slice


class ReadAhead:
    """Hands out slices in the order of their extents; two extents are in memory at a time.

    Args:
        extents: In the order in which their slices are wanted.
        source: Open; waits for reads that have begun when it is left.
        pinned_for: A device that copies from the buffers; they lie in pinned host memory then.
        done: Told the bytes of each extent read.
    """

    def __init__(
        self,
        extents: Sequence[Extent],
        *,
        source: AwaitedSource,
        pinned_for: torch.device | None,
        done: Callable[[int], None],
    ) -> None:
        self._extents: Iterator[Extent] = iter(extents)
        self._source = source
        self._done = done
        longest_bytes = max((extent.nbytes for extent in extents), default=0)
        self._buffers = [
            GrowingBuffer(torch.device("cpu"), expected_bytes=longest_bytes, pinned_for=pinned_for)
            for _ in range(2)
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

    def close(self) -> None:
        """Let go of the buffers, when what was copied from them has arrived."""
        for buffer in self._buffers:
            buffer.close()

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
        expected_bytes: Most that will be wanted; more is possible.
        pinned_for: A device that copies from or to it; host memory is pinned then. None, or the host itself: it is not.
    """

    def __init__(self, device: torch.device, *, expected_bytes: int, pinned_for: torch.device | None) -> None:
        self._device = device
        self._expected_bytes = expected_bytes
        is_pinned = pinned_for is not None and pinned_for.type != "cpu" and device.type == "cpu"
        self._pinned_for = pinned_for if is_pinned else None
        self._pinned: PinnedMemory | None = None
        self._bytes = self._made(0)

    def first(self, nbytes: int) -> torch.Tensor:
        """Return the first bytes of it; what they hold is undefined."""
        if nbytes > len(self._bytes):
            self.close()  # the two never live together
            self._bytes = self._made(max(nbytes, self._expected_bytes))
        return self._bytes[:nbytes]

    def close(self) -> None:
        """Let go of the bytes."""
        self._bytes = torch.empty(0, dtype=torch.uint8, device=self._device)
        pinned, self._pinned = self._pinned, None
        if pinned is not None:
            pinned.close()

    def _made(self, nbytes: int) -> torch.Tensor:
        if self._pinned_for is not None and nbytes:
            self._pinned = PinnedMemory(nbytes, device=self._pinned_for, threads=1, cpus=None)
            return self._pinned.bytes
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
