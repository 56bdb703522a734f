"""Edits of a tensor whose values are still in the checkpoint: on meta they change nothing, so they are refused, not lost.

torch counts in-place operations on a tensor, on meta too. It does not count those through `.data`, a common idiom of
initialisation code, so a parameter that awaits its values gives `.detach()` there, which shares the count.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from shardwise.errors import LeftOnMetaError
from shardwise.materialization import Entry, entries_of, listed

_State = tuple[
    int, torch.Size
]  # operations counted, shape of a row: how many rows are read is decided at the wrap


class AwaitedParameter(nn.Parameter):
    """A parameter on meta; what is done to its `.data` is counted as done to it."""

    @property
    def data(self) -> torch.Tensor:
        """The parameter without its history."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


class Awaited:
    """The meta tensors of deferred models, as they were when they were noted."""

    def __init__(self) -> None:
        self._noted: MutableMapping[torch.Tensor, _State] = WeakTensorKeyDictionary()

    def add(self, model: nn.Module) -> None:
        """Note the parameters and buffers on meta; those that are noted already keep their state."""
        for entry in _on_meta(model):
            if entry.tensor not in self._noted and not entry.tensor.is_inference():
                self._noted[entry.tensor] = _state_of(entry.tensor)
            if type(entry.tensor) is nn.Parameter:
                entry.tensor.__class__ = AwaitedParameter

    def take(self, model: nn.Module) -> tuple[str, ...]:
        """Return the fqns of what has been edited since, and forget the model's tensors.

        A weak reference keeps torch from giving a parameter storage under the same object.
        """
        edited = []
        for entry in _on_meta(model):
            if isinstance(entry.tensor, AwaitedParameter):
                entry.tensor.__class__ = nn.Parameter  # type: ignore[assignment]
            if entry.tensor in self._noted and self._noted.pop(entry.tensor) != _state_of(entry.tensor):
                edited.append(entry.fqn)
        return tuple(edited)


def refuse_edited(fqns: Sequence[str]) -> None:
    """Raise if there are any.

    Raises:
        LeftOnMetaError: Naming them.
    """
    if fqns:
        raise LeftOnMetaError(
            f"{listed(fqns)}: expected tensors as load_pretrained returned them, got tensors that were written to or resized "
            "before wrap_model. Their values are still in the checkpoint, so the edit would be lost. Load with "
            "load_pretrained(defer=False), where global rank 0 holds the values, or edit after wrap_model."
        )


def _on_meta(model: nn.Module) -> list[Entry]:
    return [e for e in entries_of(model, roles=("parameter", "buffer")) if e.tensor.is_meta]


def _state_of(tensor: torch.Tensor) -> _State:
    return tensor._version, tensor.shape[1:]
