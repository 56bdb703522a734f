"""Values of a model's tensors that lie in boxes outside of it, as those of a saved training do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shardwise.tensors import Region


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A box of a tensor of the model, whole on every rank.

    Args:
        region: In the tensor.
        tensor: Its elements, in host memory or pages of a file; of the region's shape.
    """

    region: Region
    tensor: torch.Tensor


Chunks = Mapping[str, Sequence[Chunk]]
"""Boxes that together are each persistent tensor of a model, by fqn; in one order on all ranks."""
