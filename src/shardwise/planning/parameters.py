"""The parameters of a model as one rank keeps them, and in which of FSDP2's units each is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from shardwise.materialization import Binding, Entry
from shardwise.plan import Layout
from shardwise.strategies.fsdp_config import FSDPConfig
from shardwise.strategies.wrapping import plan_units


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedParameter:
    """One parameter on the rank that keeps the most of it, with FSDP2's padding.

    Args:
        fqn: The first of its names.
        dtype: In which shards are stored.
        trainable: Whether it gets gradients.
        sharded: Whether FSDP2 gathers it; otherwise it is whole on every rank.
        full_numel: Elements of the full tensor.
        shard_numel: Elements on one rank.
        stored_as_kept: Whether it is one stored tensor, of its dtype: a plain load may map the file instead of copying it.
    """

    fqn: str
    dtype: torch.dtype
    trainable: bool
    sharded: bool
    full_numel: int
    shard_numel: int
    stored_as_kept: bool

    @property
    def full_bytes(self) -> int:
        """Of the full tensor in the stored dtype."""
        return self.full_numel * self.dtype.itemsize

    @property
    def shard_bytes(self) -> int:
        """On one rank, in the stored dtype."""
        return self.shard_numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedUnit:
    """What FSDP2 gathers at a time.

    Args:
        parameters: Of the unit.
        is_root: Whether it is what is left to the model itself: gathered from the start of a forward to the end of a backward.
        keep_gathered: Whether it stays gathered between its forward and its backward.
    """

    parameters: tuple[PlannedParameter, ...]
    is_root: bool
    keep_gathered: bool


def planned_units(
    model: nn.Module,
    entries: Sequence[Entry],
    layouts: Mapping[str, Layout],
    dtype_of: Mapping[str, torch.dtype],
    binding: Binding,
    *,
    ignored: frozenset[int],
) -> tuple[PlannedUnit, ...]:
    """Return the units of a model, in the order in which a strategy shards them; the root is the last.

    Args:
        model: On meta, not sharded.
        entries: Of the model.
        layouts: By fqn.
        dtype_of: In which each is kept, by fqn.
        binding: Where values are.
        ignored: Identities of the parameters that FSDP2 leaves alone.
    """
    known = {
        id(entry.tensor): _planned(entry, layouts[entry.fqn], dtype_of[entry.fqn], binding, ignored)
        for entry in entries
        if entry.role == "parameter"
    }
    units: list[PlannedUnit] = []
    for unit in plan_units(model, entries, FSDPConfig()):
        of_unit: dict[int, PlannedParameter] = {}
        for fqn in unit.fqns:
            for parameter in model.get_submodule(fqn).parameters():
                if id(parameter) in known:
                    of_unit[id(parameter)] = known.pop(id(parameter))
        units.append(
            PlannedUnit(parameters=tuple(of_unit.values()), is_root=False, keep_gathered=unit.keep_gathered)
        )
    units.append(PlannedUnit(parameters=tuple(known.values()), is_root=True, keep_gathered=True))
    return tuple(units)


def in_order_of_use(model: nn.Module, units: Sequence[PlannedUnit]) -> tuple[PlannedUnit, ...]:
    """Return the units in the order of a forward: the root first, the others as the model registers them.

    Args:
        model: As `planned_units` took it.
        units: As it returned them.
    """
    place = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    last = len(place)

    def key(unit: PlannedUnit) -> tuple[bool, int]:
        return not unit.is_root, min((place.get(p.fqn, last) for p in unit.parameters), default=last)

    return tuple(sorted((unit for unit in units if unit.parameters), key=key))


def _planned(
    entry: Entry, layout: Layout, dtype: torch.dtype, binding: Binding, ignored: frozenset[int]
) -> PlannedParameter:
    shape = tuple(entry.tensor.shape)
    local = layout.local_shape(shape, layout.mesh_ranks[0]) or ()
    bound = binding.bound.get(entry.fqn)
    one = bound.pieces[0] if bound is not None and len(bound.pieces) == 1 else None
    return PlannedParameter(
        fqn=entry.fqn,
        dtype=dtype,
        trainable=entry.tensor.requires_grad,
        sharded=id(entry.tensor) not in ignored,
        full_numel=entry.tensor.numel(),
        shard_numel=torch.Size(local).numel(),
        stored_as_kept=one is not None and one.stored.dtype == dtype and one.stored.shape == shape,
    )
