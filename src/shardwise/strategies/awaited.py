"""Edits of a tensor whose values are still in the checkpoint: on meta they change nothing, so they are refused, not lost.

torch counts in-place operations on a tensor, on meta too. It does not count those through `.data`, a common idiom of
initialisation code, so a parameter that awaits its values gives `.detach()` there, which shares the count.
Storage without values would look like the user's own at the wrap, and what is computed without values fails far from its cause:
both are refused where they are asked for.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from shardwise.errors import LeftOnMetaError, listed
from shardwise.materialization import Entry

_State = tuple[
    int, torch.Size
]  # operations counted, shape of a row: how many rows are read is decided at the wrap


_MOVES = (torch.empty_like, torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda)
_OF_VALUES = (torch.linalg.qr, torch.linalg.svd, torch.svd_lowrank)


class _WithoutValues(torch.Tensor):
    """What is done to `.data` is counted as done to the tensor, and what would need its values is refused."""

    @property
    def data(self) -> torch.Tensor:
        """The tensor without its history."""
        return _awaited(self.detach())

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation that leaves the tensor on meta; a cast of it is a tensor without values as well."""
        result = _on_meta_only(func, args, kwargs or {})
        return _awaited(result) if func in cls._stay_awaited else result

    _stay_awaited: frozenset[Any] = frozenset({torch.Tensor.to})


class AwaitedParameter(_WithoutValues, nn.Parameter):
    """A parameter on meta."""


class AwaitedValues(_WithoutValues):
    """What `.data` of an awaited parameter gives, and a cast of it: PEFT computes from that how some adapters start."""

    # nn.Parameter asks that detaching gives the same class.
    _stay_awaited = frozenset({torch.Tensor.to, torch.Tensor.detach})


def _awaited(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is torch.Tensor:
        tensor.__class__ = AwaitedValues  # not a view, which would count operations apart
    return tensor


def _on_meta_only(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in _OF_VALUES:
        raise LeftOnMetaError(
            f"{func.__name__}: expected a parameter with values, got one of a deferred model, whose values are read at "
            "wrap_model. For an adapter that starts from the base's values, as those of PiSSA and OLoRA do, load the model with "
            "load_pretrained(defer=False) and use strategy.add_adapter."
        )
    try:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
    except NotImplementedError as error:  # a copy out of meta
        raise _moved(func) from error
    if func in _MOVES and not result.is_meta:
        raise _moved(func)
    return result


def _moved(func: Any) -> LeftOnMetaError:
    return LeftOnMetaError(
        f"{func.__name__}: expected a deferred model to stay on meta until wrap_model, which reads its values and puts them on "
        "the device of the mesh, got a call that needs them before. Leave out .to(device) and to_empty; or use "
        "load_pretrained(defer=False), where global rank 0 holds the values."
    )


class Awaited:
    """The meta tensors of deferred models, as they were when they were noted."""

    def __init__(self) -> None:
        self._noted: MutableMapping[torch.Tensor, _State] = WeakTensorKeyDictionary()

    def add(self, entries: Sequence[Entry]) -> None:
        """Note a model's parameters and buffers on meta; those that are noted already keep their state."""
        for entry in _on_meta(entries):
            if not entry.tensor.is_inference():
                self._noted.setdefault(entry.tensor, _state_of(entry.tensor))
            if type(entry.tensor) is nn.Parameter:
                entry.tensor.__class__ = AwaitedParameter

    def take(self, entries: Sequence[Entry]) -> tuple[str, ...]:
        """Return the fqns of what has been edited since, and forget the model's tensors.

        A weak reference keeps torch from giving a parameter storage under the same object.
        """
        edited = []
        for entry in _on_meta(entries):
            if isinstance(entry.tensor, AwaitedParameter):
                entry.tensor.__class__ = nn.Parameter  # type: ignore[assignment]
            state = self._noted.pop(entry.tensor, None)  # each look-up makes a weak reference
            if state is not None and state != _state_of(entry.tensor):
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


def _on_meta(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.role != "attribute" and entry.tensor.is_meta]


def _state_of(tensor: torch.Tensor) -> _State:
    return tensor._version, tensor.shape[1:]
