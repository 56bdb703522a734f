"""A model whose values nothing can change, while a module's own code runs over blank copies of some of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import nn

from shardwise.materialization.collector import resting_collector
from shardwise.materialization.structure import Entry
from shardwise.materialization.walking import named_modules_of


class _StandIn(nn.Parameter):
    """On meta; it takes no storage either, as 4.57's `_init_weights` gives it: `module.A_log.data = torch.log(...)`."""

    @property
    def data(self) -> torch.Tensor:
        """The stand-in itself."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        pass


class Shield:
    """Every parameter and buffer of a model on meta while the context is open, ties kept; afterwards as they were.

    What a module's code writes to them in between goes nowhere, however far it reaches: `reset_parameters` may call those
    of its children, and `_init_weights` of a composite model sets weights of its parts. Stand-ins are plain tensors, since
    torch's random functions on a DTensor communicate.

    Args:
        model: Sharded or not.
    """

    def __init__(self, model: nn.Module) -> None:
        with resting_collector():
            self._registered = [
                (module, dict(module._parameters), dict(module._buffers))
                for _, module in named_modules_of(model)
            ]
        self._behind: dict[int, torch.Tensor] = {}  # a buffer with values, by the identity of its stand-in

    def __enter__(self) -> Self:
        """Put the stand-ins in place."""
        with resting_collector():  # they go as soon as the context ends
            self._replace_all()
        return self

    def _replace_all(self) -> None:
        stand_ins: dict[int, torch.Tensor] = {}
        for module, parameters, buffers in self._registered:
            for name, parameter in parameters.items():
                if parameter is not None and id(parameter) not in stand_ins:
                    stand_ins[id(parameter)] = _StandIn(_on_meta(parameter), requires_grad=False)
                if parameter is not None:
                    module._parameters[name] = stand_ins[id(parameter)]  # type: ignore[assignment]
            for name, buffer in buffers.items():
                if buffer is not None and id(buffer) not in stand_ins:
                    stand_ins[id(buffer)] = _on_meta(buffer)
                    if not buffer.is_meta:
                        self._behind[id(stand_ins[id(buffer)])] = buffer
                if buffer is not None:
                    module._buffers[name] = stand_ins[id(buffer)]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the model's own tensors back."""
        for module, parameters, buffers in self._registered:
            _restore(module, parameters, buffers)

    @contextmanager
    def exposing(self, module: nn.Module, blanks: Sequence[tuple[Entry, torch.Tensor]]) -> Iterator[None]:
        """Register blank tensors in the places of some entries, and copies of the other buffers' values below a module.

        A module may make one buffer from another one, so those with values can be read; nothing comes of writing to them.
        A tied parameter stands in the first of its places alone: models are tied after they are initialised, so what would be
        written to another place is lost there too.

        Args:
            module: That will run.
            blanks: Entries of the model and what stands for each.

        Yields:
            Nothing.
        """
        touched = {id(each): each for each in module.modules()}
        touched |= {id(slot.module): slot.module for entry, _ in blanks for slot in entry.slots}
        before = [
            (each, dict(each._parameters), dict(each._buffers), _plain_tensors(each))
            for each in touched.values()
        ]
        try:
            for each in module.modules():
                for name, buffer in each._buffers.items():
                    values = self._behind.get(id(buffer))
                    if values is not None:
                        each._buffers[name] = values.detach().clone()
                for name, plain in _plain_tensors(each).items():
                    each.__dict__[name] = plain.detach().clone()
            for entry, blank in blanks:
                if entry.role == "parameter":
                    slot = entry.slots[0]
                    slot.module._parameters[slot.name] = blank  # type: ignore[assignment]
                    continue
                for slot in entry.slots:
                    slot.module._buffers[slot.name] = blank
            yield
        finally:
            for each, parameters, buffers, plain_tensors in before:
                _restore(each, parameters, buffers)
                vars(each).update(plain_tensors)


def registered(entry: Entry) -> torch.Tensor | None:
    """Return what stands now where an entry is registered first: a module may have put another tensor there."""
    slot = entry.slots[0]
    return slot.module._parameters.get(slot.name, slot.module._buffers.get(slot.name))


def _restore(
    module: nn.Module,
    parameters: dict[str, nn.Parameter | None],
    buffers: dict[str, torch.Tensor | None],
) -> None:
    module._parameters.clear()
    module._parameters.update(parameters)
    module._buffers.clear()
    module._buffers.update(buffers)


def _plain_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}


def _on_meta(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device="meta")
