"""Move a model's parameters to the meta device without breaking ties, keeping their values aside."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from shardwise.checkpoint import StateDictSource
from shardwise.errors import LeftOnMetaError, listed
from shardwise.materialization.structure import Entry


def take_values(entries: Iterable[Entry], *, keep: bool) -> StateDictSource:
    """Replace every parameter by one on meta and hand over what it held.

    `nn.Module.to("meta")` makes one new parameter per place, which unties tied weights; here each parameter is
    replaced once, in all its places.

    Args:
        entries: Of a model that is not sharded; they hold what it held.
        keep: Whether this rank's values are wanted; otherwise they are dropped.

    Returns:
        The values by name: parameters, buffers and plain tensor attributes; empty unless `keep`.
    """
    values: dict[str, torch.Tensor] = {}
    for entry in entries:
        if keep:
            values.setdefault(entry.fqn, entry.tensor.detach())
        if entry.role == "parameter" and not entry.tensor.is_meta:
            empty = nn.Parameter(
                torch.empty_like(entry.tensor, device="meta"), requires_grad=entry.tensor.requires_grad
            )
            empty.__dict__.update(entry.tensor.__dict__)
            entry.replace(empty)
    return StateDictSource(values)


def refuse_meta(entries: Iterable[Entry], *, remedy: str) -> None:
    """Raise if anything of a model is left without values.

    Args:
        entries: Of the model.
        remedy: What to do about it.

    Raises:
        LeftOnMetaError: Listing names.
    """
    left = [entry.fqn for entry in entries if entry.tensor.is_meta]
    if left:
        raise LeftOnMetaError(
            f"expected every tensor of the model to have values, got {listed(left)} on meta. {remedy}"
        )
