"""A checkpoint of which only the description is here: enough to plan with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from shardwise.checkpoint.source import Run
from shardwise.checkpoint.stored_tensor import StoredTensor
from shardwise.errors import CheckpointError


class DescribedSource:
    """Names, shapes and places of tensors without their bytes.

    Args:
        name: What messages call it.
        tensors: By checkpoint name.
    """

    def __init__(self, name: str, tensors: Mapping[str, StoredTensor]) -> None:
        self.name = name
        self.tensors = dict(tensors)

    def read_into(self, file: str, offset: int, into: memoryview) -> None:
        """Raise: there is nothing to read."""
        raise CheckpointError(
            f"{self.name}: expected a checkpoint, got a description of one. Nothing can be read."
        )

    def mapped(self, runs: Sequence[Run]) -> list[torch.Tensor | None]:
        """Nothing."""
        return [None] * len(runs)

    def require_unchanged(self) -> None:
        """Nothing to compare with."""

    def close(self) -> None:
        """Nothing to close."""
