"""What a strategy has on record of models from their load to their wrap."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.utils.hooks import RemovableHandle

from shardwise.materialization import Binding, Entry, entries_of, model_inside, resting_collector
from shardwise.strategies.adapters import refuse_values_for_meta, with_adapters
from shardwise.strategies.awaited import Awaited
from shardwise.strategies.deferred import Deferred
from shardwise.strategies.forgotten import note_unwrapped
from shardwise.strategies.noted import Bindings, Origins
from shardwise.strategies.pretrained import Pretrained
from shardwise.strategies.resized import restore_means


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of a model when it is wrapped.

    Args:
        name: Directory or hub id; of a model that nobody loaded, its class.
        deferred: Values that are still in files.
        origins: Of tensors that have values already, by fqn.
        edited: Fqns of tensors that were edited though their values are still in files: that would be lost.
    """

    name: str
    deferred: Deferred
    origins: Mapping[str, str]
    edited: tuple[str, ...]


class Records:
    """What a strategy has on record of models that are not wrapped yet."""

    def __init__(self) -> None:
        self.bindings = Bindings()
        self._pretrained: WeakKeyDictionary[nn.Module, Pretrained] = WeakKeyDictionary()
        self._awaited = Awaited()
        self._refusals: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()
        self._origins = Origins()
        self._blank: WeakSet[nn.Module] = WeakSet()

    def add_deferred(
        self, model: nn.Module, entries: Sequence[Entry], pretrained: Pretrained, binding: Binding
    ) -> None:
        """Note a model on meta whose values come at the wrap."""
        with resting_collector():
            self.bindings.add_model(model, entries, binding)
            self._awaited.add(entries)
        self._refusals[model] = refuse_values_for_meta(model)
        note_unwrapped(model)
        self._pretrained[model] = pretrained

    def add_loaded(self, model: nn.Module, pretrained: Pretrained) -> None:
        """Note a model that has values on the source rank, or on all."""
        self._origins.add(model, pretrained.absent)
        self._pretrained[model] = pretrained

    def add_around(self, model: nn.Module) -> None:
        """Note what was put around a model, or into it, without values."""
        self._awaited.add(entries_of(model))

    def leave_blank(self, model: nn.Module) -> None:
        """Note that the next wrap reads and initialises nothing."""
        self._blank.add(model_inside(model))

    def take(self, model: nn.Module, *, efficient: bool) -> Record:
        """Return what is known of a model, and forget what counts for one wrap.

        Args:
            model: That is about to be wrapped; what held it on meta until then is taken off it.
            efficient: Whether it is sharded before it has values.
        """
        inside = model_inside(model)
        pretrained = self._pretrained.get(inside)
        refusal = self._refusals.pop(inside, None)
        if refusal is not None:
            refusal.remove()
        with resting_collector():
            entries = entries_of(model)
            edited = self._awaited.take(entries)
            restore_means(inside)
            deferred = self.bindings.take(model, entries)
            origins = self._origins.take(entries)
            del entries  # they hold the full tensors
        deferred = with_adapters(deferred, model, always=not efficient)
        if inside in self._blank and efficient:
            deferred = dataclasses.replace(deferred, blank=True)
        return Record(
            name=pretrained.name if pretrained is not None else type(model).__name__,
            deferred=deferred,
            origins=origins,
            edited=edited,
        )
