"""What is on record of a model whose values are still in its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardwise.materialization import Bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Deferred:
    """What is on record of a model whose values are still in its checkpoints.

    Args:
        bound: Where values are, by fqn.
        absent: Fqns of parameters that were permitted to be absent from the checkpoints.
        blank: None of them is read or initialised: the caller of the wrap does that.
    """

    bound: Mapping[str, Bound]
    absent: frozenset[str]
    blank: bool
