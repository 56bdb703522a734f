"""How transformers' own plan lays a model's parameters over an axis of tensor parallelism."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from shardwise.errors import ConfigurationError
from shardwise.materialization import Entry

_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def tensor_placements(model: nn.Module, entries: Sequence[Entry]) -> dict[str, Placement]:
    """Return the placement of each parameter that the model's plan cuts, by fqn; the others are whole on every rank of the axis.

    Source: the styles that `transformers.distributed.tensor_parallel` (5.23) registers, and `_get_parameter_plan` of
    `transformers.distributed.parallel_utils`, which looks a name up with its layer numbers replaced by `*`, then its module's.

    Args:
        model: Of transformers.
        entries: Of the model.

    Raises:
        ConfigurationError: The model has no plan.
    """
    plan: Mapping[str, str] = getattr(model, "_tp_plan", None) or {}
    if not plan:
        raise ConfigurationError(
            f"tp: expected a model for which transformers has a plan of tensor parallelism, got {type(model).__name__}, which has "
            "none. Leave tp out."
        )
    found: dict[str, Placement] = {}
    for entry in entries:
        if entry.role != "parameter":
            continue
        for slot in entry.slots:
            placement = _placement(_style(slot.fqn, plan), slot.name, entry.tensor.ndim)
            if placement is not None:
                found[entry.fqn] = placement
                break
    return found


def _style(fqn: str, plan: Mapping[str, str]) -> str:
    generic = _NUMBER.sub(".*", fqn)
    return plan.get(generic) or plan.get(generic.rpartition(".")[0]) or ""


def _placement(style: str, name: str, ndim: int) -> Placement | None:
    style = style.removeprefix("local_")  # of transformers 4.57: the same cut, without DTensors
    rows, columns = max(0, ndim - 2), ndim - 1
    if style.startswith("colwise"):
        return Shard(rows)
    if style.startswith("rowwise"):
        return None if name == "bias" else Shard(columns)
    if style == "embedding_rowwise":
        return Shard(0)
    if style == "embedding_colwise":
        return Shard(1)
    if style == "packed_colwise":
        return Shard(0) if ndim == 1 else _StridedShard(rows, split_factor=2)
    if style == "packed_rowwise":
        return None if ndim == 1 else _StridedShard(columns, split_factor=2)
    return None
