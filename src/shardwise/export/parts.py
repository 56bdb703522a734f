"""Where a tensor of the model is: boxes of it, how they lie over ranks, and what is added to it while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardwise.plan import Layout
from shardwise.tensors import Region


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A box of a tensor of the model that ranks hold in one piece or in shards.

    Args:
        key: By which each rank finds what it holds of it.
        region: In the tensor, in elements; the whole of it, or one box of several.
        layout: How the box lies over the ranks; equal on all ranks.
    """

    key: str
    region: Region
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """A term s·B·A of a weight.

    Args:
        a: Fqn of A, of shape (rank, inputs).
        b: Fqn of B, of shape (outputs, rank).
        scaling: s.
        transposed: Whether the weight has its inputs first, as an embedding has.
    """

    a: str
    b: str
    scaling: float
    transposed: bool


Terms = Mapping[str, tuple[LowRank, ...]]
"""What is added to each weight, by its fqn."""
