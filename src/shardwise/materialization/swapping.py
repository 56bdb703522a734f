"""Put storage under a parameter that stays the same Python object.

`torch.utils.swap_tensors` does that, within limits: it fails on a tensor that weak references or a graph hold, and leaves
hooks behind. The first is refused here before anything is allocated, the second is made up for.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn

from shardwise.errors import UnsupportedParameterError
from shardwise.materialization.structure import Entry

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def refuse_unswappable(entries: Iterable[Entry]) -> None:
    """Raise if a parameter on meta cannot get storage and stay the same object.

    Args:
        entries: Of the model.

    Raises:
        UnsupportedParameterError: Naming the parameter and what holds it.
    """
    for entry in entries:
        if entry.role != "parameter" or not entry.tensor.is_meta:
            continue
        if weakref.getweakrefs(entry.tensor):
            raise UnsupportedParameterError(
                f"{entry.fqn}: expected a parameter on meta that nothing refers to weakly, got "
                f"{weakref.getweakrefcount(entry.tensor)} weak references: torch.utils.swap_tensors, which gives it storage and "
                "keeps it the same object, refuses it. Drop them (weakref.ref, WeakTensorKeyDictionary), or make them "
                "after the values are there."
            )
        if entry.tensor._use_count() > 1:  # type: ignore[attr-defined]  # what swap_tensors looks at
            raise UnsupportedParameterError(
                f"{entry.fqn}: expected a parameter on meta that no graph holds, got one that autograd refers to. Drop the output "
                "of a forward on meta, views of the parameter, and hooks on its AccumulateGrad node; set such hooks when "
                "the values are there."
            )


def swap(parameter: torch.Tensor, made: nn.Parameter) -> None:
    """Give a parameter the contents of a new one; FSDP2, tied modules and optimizers that hold it see the storage.

    Args:
        parameter: On meta; hooks that were set on it stay, and their handles still remove them.
        made: With storage; not to be used afterwards.
    """
    hooks = {name: getattr(parameter, name) for name in _HOOKS}
    torch.utils.swap_tensors(parameter, made)  # type: ignore[no-untyped-call]
    for name, of_name in hooks.items():
        if of_name:
            # Assigning enters the dictionary with autograd again, which the swap left at the old contents.
            setattr(parameter, name, of_name)
