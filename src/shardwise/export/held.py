"""What of a model is written: its persistent tensors by all their names, as a state dict would have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from shardwise.checkpoint import StoredTensor
from shardwise.conversion import pinned_dtypes
from shardwise.errors import CheckpointError, LeftOnMetaError, listed
from shardwise.export.chunks import Chunks
from shardwise.materialization.names import clean_fqn, model_inside
from shardwise.materialization.storage import local_of
from shardwise.materialization.structure import Entry, entries_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The persistent tensors of a model.

    Args:
        entries: One for each tensor.
        stored: By each name that a checkpoint's library has for it, in the order of a state dict: its shape, and the dtype in
            which it is written.
        first_name: From each of these names to the first fqn of its tensor.
        ties: Names of one tensor, for each that has several.
        parameters: Number of elements of all parameters among them.
        dtype: Of the first floating point parameter, as a config names it; None where there is none.
    """

    entries: tuple[Entry, ...]
    stored: Mapping[str, StoredTensor]
    first_name: Mapping[str, str]
    ties: tuple[tuple[str, ...], ...]
    parameters: int
    dtype: torch.dtype | None


def held_of(
    model: nn.Module,
    dtype: torch.dtype | None,
    *,
    chunks: Chunks | None = None,
    name_of: Callable[[str], str | None] | None = None,
) -> Held:
    """Return what of a model is written.

    Args:
        model: Sharded or not, with values.
        dtype: In which floating point tensors are written, but for those that the model's class keeps in another; None for
            their own.
        chunks: Where the values are, if not in the model, which may be on meta then.
        name_of: From a tensor's fqn to the name that a checkpoint's library has for it, None of what is not written; left out,
            they are the same.

    Raises:
        CheckpointError: The chunks are not those of this model.
        LeftOnMetaError: A tensor has no values.
    """
    entries = tuple(entry for entry in entries_of(model, roles=("parameter", "buffer")) if entry.persistent)
    own_dtype = {entry.fqn: entry.tensor.dtype for entry in entries}
    if chunks is not None:
        _require_same_tensors(entries, chunks)
        own_dtype = {entry.fqn: chunks[entry.fqn][0].tensor.dtype for entry in entries}
    on_meta = [entry.fqn for entry in entries if local_of(entry.tensor).is_meta]
    if on_meta and chunks is None:
        raise LeftOnMetaError(
            f"export_checkpoint: expected a model with values, got none for {listed(on_meta)}. Wrap or materialize it first; a "
            "TransformersModel wraps at its first forward."
        )
    entry_of = {slot.fqn: entry for entry in entries for slot in entry.slots}
    written_as = _dtypes(model_inside(model) if name_of is not None else model, dtype)
    stored: dict[str, StoredTensor] = {}
    first_name: dict[str, str] = {}
    names: dict[str, list[str]] = {}
    for fqn in _in_order_of_state_dict(model):
        name = name_of(fqn) if name_of is not None else fqn
        if fqn in entry_of and name is not None and name not in stored:
            entry = entry_of[fqn]
            stored[name] = _as_stored(name, entry.tensor, written_as(name, own_dtype[entry.fqn]))
            first_name[name] = entry.fqn
            names.setdefault(entry.fqn, []).append(name)
    parameters = [entry for entry in entries if entry.role == "parameter" and entry.fqn in names]
    own_dtypes = [own_dtype[entry.fqn] for entry in parameters]
    return Held(
        entries=entries,
        stored=stored,
        first_name=first_name,
        ties=tuple(tuple(of) for of in names.values() if len(of) > 1),
        dtype=dtype or next((own for own in own_dtypes if own.is_floating_point), None),
        parameters=sum(entry.tensor.numel() for entry in parameters),
    )


def _require_same_tensors(entries: Sequence[Entry], chunks: Chunks) -> None:
    wanted = {entry.fqn: entry for entry in entries}
    absent, unexpected = sorted(wanted.keys() - chunks.keys()), sorted(chunks.keys() - wanted.keys())
    if absent or unexpected:
        which = f"lacks {listed(absent)}" if absent else f"has {listed(unexpected)} as well"
        raise CheckpointError(
            f"export: expected values of this model's tensors; what was saved {which}. Build the model as in the training."
        )
    for fqn, entry in wanted.items():
        count = sum(chunk.region.numel for chunk in chunks[fqn])
        if not chunks[fqn] or count != entry.tensor.numel():
            raise CheckpointError(
                f"{fqn}: expected {entry.tensor.numel()} elements of shape {tuple(entry.tensor.shape)} from the model, got {count} that "
                "were saved. Build the model as in the training."
            )


def _in_order_of_state_dict(model: nn.Module) -> list[str]:
    return [
        (clean_fqn(f"{prefix}.") if prefix else "") + name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in (*module._parameters, *module._buffers)
        if name not in module._non_persistent_buffers_set
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
