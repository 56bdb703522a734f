"""What is noted of a model's tensors when they are loaded, to be found again when the model is wrapped.

By the tensor's identity, which outlives a new name: a model may become a part of another one before it is wrapped.
"""

from __future__ import annotations

from collections.abc import Collection, MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from shardwise.materialization import Binding, Bound, Entry, entries_of
from shardwise.strategies.deferred import Deferred
from shardwise.strategies.resized import is_resized_head, output_head, resized

_NOT_NOTED: Any = object()


class Bindings:
    """Which tensor of which checkpoint gives a meta tensor its values."""

    def __init__(self) -> None:
        self._bound: MutableMapping[torch.Tensor, Bound | None] = WeakTensorKeyDictionary()
        self._heads: WeakKeyDictionary[nn.Module, dict[str, Bound]] = WeakKeyDictionary()

    def add_model(self, model: nn.Module, entries: Sequence[Entry], binding: Binding) -> None:
        """Note where a transformers model's values are, and those of its output head apart: resizing makes a new one."""
        self.add(entries, binding)
        head = output_head(model)
        if head is not None:
            of_head = ((name, self._bound.get(parameter)) for name, parameter in head.named_parameters())
            self._heads[model] = {name: bound for name, bound in of_head if bound is not None}

    def add(self, entries: Sequence[Entry], binding: Binding) -> None:
        """Note where a model's values are; what the checkpoint lacks is noted as permitted to be absent."""
        absent = frozenset(binding.absent)
        for entry in entries:
            if entry.role == "attribute":
                continue
            of = binding.bound.get(entry.fqn)
            if of is not None:
                self._bound[entry.tensor] = of
            elif entry.fqn in absent:
                self._bound[entry.tensor] = None

    def has(self, model: nn.Module) -> bool:
        """Return whether values of a model are still to be read."""
        return any(entry.tensor in self._bound for entry in entries_of(model, roles=("parameter",)))

    def take(self, model: nn.Module, entries: Sequence[Entry]) -> Deferred:
        """Return what is noted of a model's tensors, by the names that they have now, and forget it.

        A weak reference keeps torch from giving a parameter storage under the same object.
        """
        bound: dict[str, Bound] = {}
        absent: set[str] = set()
        self._note_new_heads(model)
        for entry in entries:
            if entry.role == "attribute" or not entry.tensor.is_meta:
                continue
            of = self._bound.pop(entry.tensor, _NOT_NOTED)  # each look-up makes a weak reference
            if of is _NOT_NOTED:
                continue
            if of is None:
                absent.add(entry.fqn)
            else:
                bound[entry.fqn], has_grown = resized(entry, of)
                if has_grown:
                    absent.add(entry.fqn)
        return Deferred(bound=bound, absent=frozenset(absent), blank=False)

    def _note_new_heads(self, model: nn.Module) -> None:
        for module in list(self._heads):
            if not any(module is each for each in model.modules()):
                continue
            former = self._heads.pop(module)
            if is_resized_head(module, former):
                for name, parameter in output_head(module).named_parameters():  # type: ignore[union-attr]
                    if name in former and parameter not in self._bound:
                        self._bound[parameter] = former[name]


class Origins:
    """Where the values of a model's tensors come from that `from_pretrained` gave values."""

    def __init__(self) -> None:
        self._origins: MutableMapping[torch.Tensor, str] = WeakTensorKeyDictionary()

    def add(self, model: nn.Module, absent: Collection[str]) -> None:
        """Note origins of all parameters and buffers.

        Args:
            model: As it was loaded, with values or, elsewhere than on the source rank, without.
            absent: Names that the checkpoint lacked.
        """
        for entry in entries_of(model):
            lacked = any(slot.fqn in absent for slot in entry.slots)
            if entry.role == "parameter":
                self._origins[entry.tensor] = "initialised" if lacked else "checkpoint"
            elif entry.role == "buffer":
                self._origins[entry.tensor] = (
                    "checkpoint" if entry.persistent and not lacked else "recomputed"
                )

    def take(self, entries: Sequence[Entry]) -> dict[str, str]:
        """Return what is noted of a model's tensors, by the names that they have now, and forget it; as `Bindings.take`."""
        if not self._origins:
            return {}
        found = ((e.fqn, self._origins.pop(e.tensor, None)) for e in entries if e.role != "attribute")
        return {fqn: origin for fqn, origin in found if origin is not None}
