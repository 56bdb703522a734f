"""What can hand out tensor bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch

from shardwise.checkpoint.stored_tensor import StoredTensor


@runtime_checkable
class Source(Protocol):
    """Full tensors by name, read by byte ranges; `shardwise.testing.SourceTests` is what an implementation must pass.

    Reads may come from several threads at a time.
    """

    @property
    def name(self) -> str:
        """What a message calls it: a path, a hub id."""

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

    def mapped(self, file: str, offset: int, *, dtype: torch.dtype, numel: int) -> torch.Tensor | None:
        """Return a flat tensor over a file's bytes that can be written without changing the file.

        Args:
            file: `StoredTensor.file` of a tensor of this source.
            offset: First byte, from the start of the file.
            dtype: Of the elements.
            numel: Number of elements.

        Returns:
            The tensor; None where this source, or this offset, cannot be mapped.
        """

    def require_unchanged(self) -> None:
        """Raise unless every file that was read is still what it was.

        Raises:
            CheckpointError: Naming the file.
        """

    def close(self) -> None:
        """Let go of open files. Mapped tensors stay usable."""
