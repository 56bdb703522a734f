"""What of a model is written: its persistent tensors by all their names, as a state dict would have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from shardwise.checkpoint import StoredTensor
from shardwise.conversion import pinned_dtypes
from shardwise.errors import LeftOnMetaError
from shardwise.materialization.binding import listed
from shardwise.materialization.names import clean_fqn
from shardwise.materialization.storage import local_of
from shardwise.materialization.structure import Entry, entries_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The persistent tensors of a model.

    Args:
        entries: One for each tensor.
        stored: By each of its names, in the order of a state dict: its shape, and the dtype in which it is written.
        shards: This rank's part of each tensor, by each of its names.
        ties: Names of one tensor, for each that has several.
    """

    entries: tuple[Entry, ...]
    stored: Mapping[str, StoredTensor]
    shards: Mapping[str, torch.Tensor]
    ties: tuple[tuple[str, ...], ...]


def held_of(model: nn.Module, dtype: torch.dtype | None) -> Held:
    """Return what of a model is written.

    Args:
        model: Sharded or not, with values.
        dtype: In which floating point tensors are written, but for those that the model's class keeps in another; None for
            their own.

    Raises:
        LeftOnMetaError: A tensor has no values.
    """
    entries = tuple(entry for entry in entries_of(model, roles=("parameter", "buffer")) if entry.persistent)
    on_meta = [entry.fqn for entry in entries if local_of(entry.tensor).is_meta]
    if on_meta:
        raise LeftOnMetaError(
            f"export_checkpoint: expected a model with values, got none for {listed(on_meta)}. Wrap or materialize it first; a "
            "TransformersModel wraps at its first forward."
        )
    names = {id(entry.tensor): tuple(dict.fromkeys(slot.fqn for slot in entry.slots)) for entry in entries}
    tensor_of = {name: entry.tensor for entry in entries for name in names[id(entry.tensor)]}
    written_as = _dtypes(model, dtype)
    stored = {}
    for name in _in_order_of_state_dict(model):
        if name in tensor_of:
            stored[name] = _as_stored(name, tensor_of[name], written_as(name, tensor_of[name].dtype))
    return Held(
        entries=entries,
        stored=stored,
        shards={name: local_of(tensor) for name, tensor in tensor_of.items()},
        ties=tuple(of for of in names.values() if len(of) > 1),
    )


def _in_order_of_state_dict(model: nn.Module) -> list[str]:
    return [
        (clean_fqn(f"{prefix}.") if prefix else "") + name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in (*module._parameters, *module._buffers)
    ]


def _as_stored(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> StoredTensor:
    shape = tuple(tensor.shape)
    return StoredTensor(
        name=name,
        shape=shape,
        dtype=dtype,
        file=name,
        start=0,
        stop=torch.Size(shape).numel() * dtype.itemsize,
    )


def _dtypes(model: nn.Module, dtype: torch.dtype | None) -> Callable[[str, torch.dtype], torch.dtype]:
    if dtype is None:
        return lambda name, own: own
    pinned = pinned_dtypes(model, dtype, stored=True)

    def written_as(name: str, own: torch.dtype) -> torch.dtype:
        if not own.is_floating_point or own.itemsize == 1:
            return own
        return pinned(name) or dtype

    return written_as
