"""Where a tensor's bytes lie."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from shardwise.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A full tensor in a source, as a run of bytes in row-major order.

    Args:
        name: Checkpoint name.
        shape: In elements.
        dtype: Of its elements.
        file: Name of the file within its source.
        start: First byte in the file, inclusive.
        stop: Last byte in the file, exclusive.

    Raises:
        CheckpointError: The bytes do not fit the shape and dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    start: int
    stop: int

    def __post_init__(self) -> None:
        expected = math.prod(self.shape) * self.dtype.itemsize
        if self.start < 0 or self.stop - self.start != expected:
            raise CheckpointError(
                f"{self.name} in {self.file}: expected {expected} bytes for {self.dtype} of shape {self.shape}, got the "
                f"extent [{self.start}, {self.stop}). The file is damaged: get it again."
            )

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start
