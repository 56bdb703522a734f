"""Which tensor of a checkpoint gives each tensor of a model its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from shardwise.checkpoint import Source, StoredTensor
from shardwise.errors import CheckpointError, ConfigurationError, ShapeMismatchError
from shardwise.materialization.names import checkpoint_name_of
from shardwise.materialization.structure import Entry
from shardwise.tensors import dtype_name

Rename = Mapping[str, str] | Callable[[str], str] | None
_MOST_NAMES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A tensor of a model and where its values are.

    Args:
        source: That holds it.
        stored: Within the source.
    """

    source: Source
    stored: StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What a checkpoint has for a model.

    Args:
        bound: By fqn, the first of a tied tensor's names.
        absent: Fqns of parameters and persistent buffers that the checkpoint lacks.
        unexpected: Checkpoint names that nothing in the model takes.
    """

    bound: Mapping[str, Bound]
    absent: tuple[str, ...]
    unexpected: tuple[str, ...]


def bind(entries: Sequence[Entry], source: Source, *, rename: Rename) -> Binding:
    """Find each parameter and persistent buffer in a checkpoint, by name.

    Args:
        entries: Of the model.
        source: The checkpoint.
        rename: From a name in the model, without wrapper prefixes, to a name in the checkpoint; names that a mapping
            lacks stay as they are.

    Returns:
        The binding.

    Raises:
        CheckpointError: The checkpoint holds several names of one tied tensor.
        ConfigurationError: A renamed tensor is not in the model.
    """
    if isinstance(rename, Mapping):
        _refuse_unknown(rename, entries)
    bound: dict[str, Bound] = {}
    absent: list[str] = []
    for entry in entries:
        if not entry.persistent:
            continue
        names = list(dict.fromkeys(_renamed(slot.fqn, rename) for slot in entry.slots))
        found = [name for name in names if name in source.tensors]
        if len(found) > 1:
            raise CheckpointError(
                f"{source.name}: expected one tensor for {' = '.join(slot.fqn for slot in entry.slots)}, which the model "
                f"ties, got {', '.join(found)}. Untie them in the config (tie_word_embeddings=False), or load with "
                "defer=False, where the model's own loader decides."
            )
        if found:
            bound[entry.fqn] = Bound(source=source, stored=source.tensors[found[0]])
        else:
            absent.append(entry.fqn)
    used = {of.stored.name for of in bound.values()}
    return Binding(
        bound=bound,
        absent=tuple(absent),
        unexpected=tuple(name for name in source.tensors if name not in used),
    )


def check_bound(entries: Sequence[Entry], bound: Mapping[str, Bound]) -> None:
    """Raise unless every bound tensor has the model's shape and a dtype that can become the model's.

    Raises:
        ShapeMismatchError: Naming tensor, file and both shapes.
        CheckpointError: Naming tensor, file and both dtypes.
    """
    for entry in entries:
        if entry.role == "attribute" or entry.fqn not in bound:
            continue
        stored = bound[entry.fqn].stored
        where = f"{entry.fqn}: expected {tuple(entry.tensor.shape)} {dtype_name(entry.tensor.dtype)} from the model, "
        got = f"got {stored.shape} {dtype_name(stored.dtype)} of {stored.name} in {stored.file}. "
        if tuple(entry.tensor.shape) != stored.shape:
            raise ShapeMismatchError(where + got + "Check that config.json belongs to this checkpoint.")
        if not _castable(stored.dtype, entry.tensor.dtype):
            raise CheckpointError(
                where
                + got
                + "A quantised weight needs its scales: use an unquantised checkpoint, or build the model in "
                "the checkpoint's dtype."
            )


def permitted(absent: Sequence[str], missing: str | Sequence[str], *, name: str) -> frozenset[str]:
    """Return what may be absent from a checkpoint.

    Args:
        absent: Fqns that the checkpoint lacks.
        missing: `"error"`, `"init"`, or patterns of names.
        name: Of the checkpoint, for the message.

    Returns:
        All of `absent`.

    Raises:
        CheckpointError: Listing the names that no pattern permits.
    """
    if missing == "init":
        return frozenset(absent)
    patterns = [] if missing == "error" else [missing] if isinstance(missing, str) else list(missing)
    refused = [fqn for fqn in absent if not any(fnmatchcase(fqn, pattern) for pattern in patterns)]
    if refused:
        raise CheckpointError(
            f"{name}: expected a value for every parameter, got none for {listed(refused)}. If these are new, for "
            "example a head, pass missing='init' or a list of name patterns; if not, the checkpoint is incomplete, "
            "belongs to another class, or holds these weights in another layout under other names."
        )
    return frozenset(absent)


def listed(names: Sequence[str]) -> str:
    """Return names as text, cut where there are many, with their number."""
    return f"{', '.join(names[:_MOST_NAMES])} ({len(names)} in all)"


def _castable(stored: torch.dtype, wanted: torch.dtype) -> bool:
    if stored == wanted:
        return True
    both_float = stored.is_floating_point and wanted.is_floating_point
    # Without its scales an 8-bit float is not the weight, and nothing here makes scales.
    return both_float and min(stored.itemsize, wanted.itemsize) > 1


def _renamed(fqn: str, rename: Rename) -> str:
    if rename is None:
        return checkpoint_name_of(fqn)
    if isinstance(rename, Mapping):
        name = checkpoint_name_of(fqn)
        return rename.get(fqn, rename.get(name, name))
    return rename(fqn)


def _refuse_unknown(rename: Mapping[str, str], entries: Sequence[Entry]) -> None:
    known = {name for e in entries for s in e.slots for name in (s.fqn, checkpoint_name_of(s.fqn))}
    unknown = [name for name in rename if name not in known]
    if unknown:
        raise ConfigurationError(
            f"rename: expected names of the model's parameters and buffers as keys, got {listed(unknown)}. Map from the "
            "name in the model to the name in the checkpoint."
        )
