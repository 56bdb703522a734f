"""What is noted of a model's tensors when they are loaded, to be found again when the model is wrapped.

By the tensor's identity, which outlives a new name: a model may become a part of another one before it is wrapped.
"""

from __future__ import annotations

from collections.abc import Collection, MutableMapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from shardwise.materialization import Binding, Bound, Entry, entries_of
from shardwise.strategies.deferred import Deferred
from shardwise.strategies.resized import is_resized_head, output_head, resized


class Bindings:
    """Which tensor of which checkpoint gives a meta tensor its values."""

    def __init__(self) -> None:
        self._bound: MutableMapping[torch.Tensor, Bound | None] = WeakTensorKeyDictionary()
        self._heads: WeakKeyDictionary[nn.Module, dict[str, Bound]] = WeakKeyDictionary()

    def add_model(self, model: nn.Module, binding: Binding) -> None:
        """Note where a transformers model's values are, and those of its output head apart: resizing makes a new one."""
        self.add(entries_of(model, roles=("parameter", "buffer")), binding)
        head = output_head(model)
        if head is not None:
            of_head = ((name, self._bound.get(parameter)) for name, parameter in head.named_parameters())
            self._heads[model] = {name: bound for name, bound in of_head if bound is not None}

    def add(self, entries: Sequence[Entry], binding: Binding) -> None:
        """Note where a model's values are; what the checkpoint lacks is noted as permitted to be absent."""
        for entry in entries:
            if entry.fqn in binding.bound:
                self._bound[entry.tensor] = binding.bound[entry.fqn]
            elif entry.fqn in binding.absent:
                self._bound[entry.tensor] = None

    def has(self, model: nn.Module) -> bool:
        """Return whether values of a model are still to be read."""
        return any(entry.tensor in self._bound for entry in entries_of(model, roles=("parameter",)))

    def take(self, model: nn.Module) -> Deferred:
        """Return what is noted of a model's tensors, by the names that they have now, and forget it.

        A weak reference keeps torch from giving a parameter storage under the same object.
        """
        bound: dict[str, Bound] = {}
        absent: set[str] = set()
        self._note_new_heads(model)
        for entry in entries_of(model, roles=("parameter", "buffer")):
            if not entry.tensor.is_meta or entry.tensor not in self._bound:
                continue
            of = self._bound.pop(entry.tensor)
            if of is None:
                absent.add(entry.fqn)
            else:
                bound[entry.fqn], has_grown = resized(entry, of)
                if has_grown:
                    absent.add(entry.fqn)
        return Deferred(bound=bound, absent=frozenset(absent), blank=False)

    def _note_new_heads(self, model: nn.Module) -> None:
        for module in model.modules():
            former = self._heads.pop(module, None)
            if former and is_resized_head(module, former):
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

    def take(self, model: nn.Module) -> dict[str, str]:
        """Return what is noted of a model's tensors, by the names that they have now, and forget it; as `Bindings.take`."""
        if not self._origins:
            return {}
        entries = entries_of(model, roles=("parameter", "buffer"))
        return {e.fqn: self._origins.pop(e.tensor) for e in entries if e.tensor in self._origins}
