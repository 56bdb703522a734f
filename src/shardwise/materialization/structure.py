"""What a model consists of, apart from values: every tensor with its names, shape, dtype and role.

Ranks compare structures before anything is sharded, because FSDP2 itself would hang or mix up rows where they differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from shardwise.errors import shortened
from shardwise.materialization.collector import resting_collector
from shardwise.materialization.walking import modules_by_prefix
from shardwise.tensors import dtype_name

Role = Literal["parameter", "buffer", "attribute"]
_ROLES: tuple[Role, ...] = ("parameter", "buffer", "attribute")


class Slot(NamedTuple):
    """One place in a module where a tensor is registered."""

    module: nn.Module
    name: str
    fqn: str


class Entry(NamedTuple):
    """One tensor of a model and every place where it is registered.

    Args:
        tensor: The tensor itself.
        role: A `parameter`, a `buffer`, or a plain tensor kept as an `attribute` of a module, which
            `nn.Module` does not move or save.
        slots: All places, in module order; more than one where the tensor is tied. One that a state dict holds comes first.
        persistent: Of buffers: whether a state dict holds it, by one of its names at least.
    """

    tensor: torch.Tensor
    role: Role
    slots: tuple[Slot, ...]
    persistent: bool

    @property
    def fqn(self) -> str:
        """The first of its names."""
        return self.slots[0].fqn

    def replace(self, tensor: torch.Tensor) -> None:
        """Put another tensor in every place where this one is registered."""
        for slot in self.slots:
            if self.role == "parameter" and type(slot.module).__setattr__ is not nn.Module.__setattr__:
                # nn.LSTM and its kin keep a second list of their weights, which their own assignment updates.
                setattr(slot.module, slot.name, tensor)
            elif self.role == "parameter":
                slot.module._parameters[slot.name] = tensor  # type: ignore[assignment]
            elif self.role == "buffer":
                slot.module._buffers[slot.name] = tensor
            else:
                slot.module.__dict__[slot.name] = tensor


def entries_of(model: nn.Module, *, roles: Sequence[Role] = _ROLES) -> tuple[Entry, ...]:
    """Return every tensor of a model once, parameters first, each with all places where it is registered.

    Args:
        model: Any module, sharded or not.
        roles: Which of them; a model of very many parameters is walked faster for its buffers alone.

    Returns:
        Parameters, then buffers, then plain tensor attributes; each in module order. An attribute that is the
        same object as a parameter or buffer belongs to that entry's tensor and is restored with it.
    """
    with resting_collector():
        return _found(model, roles)


def renewed(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Return entries with the tensors that are registered in their places now, without walking the model again.

    Args:
        entries: Of a model that has the same places still: whose tensors were replaced, or whose parameters were sharded.
    """
    now = ((entry, _registered(entry.slots[0], entry.role)) for entry in entries)
    return tuple(entry if entry.tensor is tensor else entry._replace(tensor=tensor) for entry, tensor in now)


def _registered(slot: Slot, role: Role) -> Any:
    if role == "parameter":
        return slot.module._parameters[slot.name]
    if role == "attribute" and slot.name in slot.module.__dict__:
        return slot.module.__dict__[slot.name]
    return slot.module._buffers[
        slot.name
    ]  # a buffer; or one that is a parameter too, which counts as an attribute


def _found(model: nn.Module, roles: Sequence[Role]) -> tuple[Entry, ...]:
    found: dict[int, tuple[torch.Tensor, Role, list[Slot], bool]] = {}
    aliases: dict[int, list[Slot]] = {}
    # A shared module is every name that it has: a checkpoint may hold any one of them.
    modules = modules_by_prefix(model)
    for role in roles:
        for prefix, module in modules:
            # Only tensors are registered, and asking each of a great many for its class takes longer than the walk.
            tensors: Mapping[str, Any] = (
                module._parameters
                if role == "parameter"
                else module._buffers
                if role == "buffer"
                else _plain_tensors(module)
            )
            if not tensors:
                continue
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                slot = Slot(module, name, prefix + name)
                key = id(tensor)
                known = found.get(key)
                persistent = role == "parameter" or (
                    role == "buffer" and name not in module._non_persistent_buffers_set
                )
                if known is None:
                    found[key] = (tensor, role, [slot], persistent)
                elif known[1] == role and persistent and not known[3]:
                    # It goes by the name that a state dict has for it.
                    found[key] = (tensor, role, [slot, *known[2]], persistent)
                elif known[1] == role:
                    known[2].append(slot)
                else:
                    aliases.setdefault(key, []).append(slot)
    entries = [
        Entry(tensor, role, tuple(slots), persistent) for tensor, role, slots, persistent in found.values()
    ]
    for key, slots in aliases.items():
        entries.append(Entry(tensor=found[key][0], role="attribute", slots=tuple(slots), persistent=False))
    return tuple(entries)


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def _plain_tensors(module: nn.Module) -> Mapping[str, torch.Tensor]:
    # What torch itself keeps there is no tensor, and most modules have little else.
    for name in module.__dict__.keys() - _OF_EVERY_MODULE:
        if isinstance(module.__dict__[name], torch.Tensor):
            return {name: value for name, value in module.__dict__.items() if isinstance(value, torch.Tensor)}
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """The comparable part of a model: one line per tensor, and their digest."""

    lines: tuple[str, ...]

    @classmethod
    def of(cls, entries: tuple[Entry, ...]) -> Structure:
        """Describe entries.

        Buffers are described without dtype: on ranks that built their model without values, upstream may have
        cast them, and the source rank's dtype wins. Plain attributes are left out: they may exist on one rank only.
        """
        lines = []
        for entry in entries:
            if entry.role == "attribute":
                continue
            names = " = ".join(slot.fqn for slot in entry.slots)
            shape = tuple(entry.tensor.shape)
            if entry.role == "parameter":
                trainable = "trainable" if entry.tensor.requires_grad else "frozen"
                lines.append(f"parameter {names}: {shape} {dtype_name(entry.tensor.dtype)} {trainable}")
            else:
                kind = "persistent" if entry.persistent else "non-persistent"
                lines.append(f"buffer {names}: {shape} {kind}")
        return cls(lines=tuple(lines))

    @property
    def digest(self) -> str:
        """A digest that is equal exactly where the lines are."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the lines as text that another rank can read."""
        return json.dumps(self.lines)


def structure_difference(expected_json: str, got_json: str, *, limit: int) -> str:
    """Say how one rank's structure differs from another's.

    Args:
        expected_json: `Structure.to_json` of the rank to compare against.
        got_json: The same of the other rank.
        limit: Most lines to name on either side.

    Returns:
        Text that names the tensors that only one side has as they are.
    """
    expected, got = json.loads(expected_json), json.loads(got_json)
    of_expected, of_got = set(expected), set(got)
    only_expected = [line for line in expected if line not in of_got]
    only_got = [line for line in got if line not in of_expected]
    if not only_expected and not only_got:
        return "the same tensors in another order"
    parts = []
    for label, lines in (("expected", only_expected), ("got", only_got)):
        if lines:
            parts.append(f"{label} {shortened(lines, most=limit, between='; ')}")
    return ", ".join(parts)
