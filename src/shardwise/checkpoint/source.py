"""What can hand out tensor bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from shardwise.checkpoint.stored_tensor import StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Elements that lie one after the other in a file.

    Args:
        file: `StoredTensor.file` of a tensor of the source.
        start: First byte, from the start of the file.
        dtype: Of the elements.
        numel: Number of elements.
    """

    file: str
    start: int
    dtype: torch.dtype
    numel: int

    @property
    def stop(self) -> int:
        """Last byte, exclusive."""
        return self.start + self.numel * self.dtype.itemsize


class Readable(Protocol):
    """Full tensors by name, read by byte ranges."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by checkpoint name."""

    def read_into(self, file: str, offset: int, into: memoryview) -> None:
        """Fill a buffer with the bytes of a file from an offset on.

        Args:
            file: `StoredTensor.file` of a tensor of this source.
            offset: First byte, from the start of the file.
            into: Writable, of bytes; its length says how much to read.

        Raises:
            CheckpointError: The file ends before, cannot be read, or is not the one that was described.
        """


@runtime_checkable
class Source(Readable, Protocol):
    """What can hand out tensor bytes; `shardwise.testing.SourceTests` is what an implementation must pass.

    Reads may come from several threads at a time.
    """

    @property
    def name(self) -> str:
        """What a message calls it: a path, a hub id."""

    def mapped(self, runs: Sequence[Run]) -> list[torch.Tensor | None]:
        """Return flat tensors over the bytes of files, which can be written without changing the files.

        One load asks once for all that it wants: the pages of two calls are never the same memory, so that what one model writes
        is not seen in another one. Runs of one call that overlap in a file do share memory.

        Args:
            runs: Of any files of this source.

        Returns:
            A tensor for each run, in order; None where this source, or this place in a file, cannot be mapped.
        """

    def require_unchanged(self) -> None:
        """Raise unless every file that was read is still what it was.

        Raises:
            CheckpointError: Naming the file.
        """

    def close(self) -> None:
        """Let go of open files. Mapped tensors stay usable."""


def read_scattered(source: Source, file: str, offset: int, parts: Sequence[memoryview]) -> None:
    """Fill buffers with the bytes that follow each other in a file from an offset on.

    A source may have a method of this name that takes one request for all of them; else each is read on its own.

    Args:
        source: Of the file.
        file: `StoredTensor.file` of a tensor of the source.
        offset: First byte, from the start of the file.
        parts: Writable, of bytes, in file order.

    Raises:
        CheckpointError: As `Source.read_into`.
    """
    at_once = getattr(source, "read_scattered", None)
    if at_once is not None:
        at_once(file, offset, parts)
        return
    for part in parts:
        source.read_into(file, offset, part)
        offset += len(part)


def stitched(source: Source, shards: Sequence[Sequence[Run]]) -> list[torch.Tensor | None]:
    """Return flat tensors, each over several runs of bytes of files, which can be written without changing the files.

    A source may have a method of this name that puts pages of its files side by side; of others nothing can be had so.

    Args:
        source: Of the files.
        shards: The runs of each tensor, in its order, of one dtype; their places in the file and in the tensor differ by the same
            number of bytes modulo the page size.

    Returns:
        A tensor for each, in order; None where the source, or the system, cannot.

    Raises:
        CheckpointError: The bytes that share a page with another run cannot be read.
    """
    at_once = getattr(source, "stitched", None)
    return at_once(shards) if at_once is not None else [None] * len(shards)


def fetch_mapped(source: Source, ranges: Sequence[tuple[str, int, int]]) -> None:
    """Begin to read what was mapped of a source, so that the first touch need not; a source without a method of this name does not.

    Args:
        source: Of the files.
        ranges: `StoredTensor.file`, first and last byte (exclusive) of each.
    """
    at_once = getattr(source, "fetch_mapped", None)
    if at_once is not None:
        at_once(ranges)
