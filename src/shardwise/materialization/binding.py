"""Which tensor of a checkpoint gives each tensor of a model its values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from shardwise.checkpoint import Source, StoredTensor
from shardwise.conversion import ConversionGroup, WholeGroup, declaration_of, derive
from shardwise.errors import CheckpointError, ConfigurationError, ShapeMismatchError, listed
from shardwise.materialization.names import checkpoint_name_of, model_inside
from shardwise.materialization.structure import Entry
from shardwise.plan import StoredPiece, as_stored
from shardwise.tensors import dtype_name

Rename = Mapping[str, str] | Callable[[str], str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A tensor of a model and where its values are.

    Args:
        source: That holds them.
        name: That the checkpoint's library has for it.
        shape: That the source has for it, in elements.
        pieces: Of stored tensors that fill it; none where it is empty, or made by `whole`.
        whole: The conversion that makes it of whole tensors, if it must see those.
    """

    source: Source
    name: str
    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]
    whole: WholeGroup | None

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that it is made of."""
        if self.whole is not None:
            return tuple(self.source.tensors[name] for name in self.whole.group.source_names)
        return tuple(each.stored for each in self.pieces)

    @property
    def made_dtype(self) -> torch.dtype | None:
        """The dtype in which a conversion makes it, if that is another one than the loader reads in."""
        return self.whole.made_dtypes.get(self.name) if self.whole is not None else None

    @property
    def place(self) -> str:
        """Where its values are, for messages."""
        stored = self.stored
        if not stored:
            return self.source.name
        more = f" and {len(stored) - 1} more" if len(stored) > 1 else ""
        return f"{stored[0].name} in {stored[0].file}{more}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A further tensor of a checkpoint for a tensor that the model ties.

    Args:
        fqn: The name in the model under which it was found.
        of: The first of the tied tensor's names.
        bound: Where its values are: one stored tensor as it is, of the same shape as the one that is bound.
    """

    fqn: str
    of: str
    bound: Bound

    @property
    def stored(self) -> StoredTensor:
        """The tensor within the source."""
        return self.bound.stored[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What a checkpoint has for a model.

    Args:
        bound: By fqn, the first of a tied tensor's names.
        aliases: Of tied tensors that the checkpoint holds under several names: all but the one that is bound. Whether
            their values are equal is `require_equal_aliases`'s part.
        absent: Fqns of parameters and persistent buffers that the checkpoint lacks.
        optional: Those of them that the model's class declares a checkpoint may lack.
        unexpected: Names that nothing in the model takes, without those that its class declares so.
        untied: Those of `absent` that the model's class makes further names of a tensor that is bound, by fqn, with the
            name of that one: somebody has broken the tie.
    """

    bound: Mapping[str, Bound]
    aliases: tuple[Alias, ...]
    absent: tuple[str, ...]
    optional: frozenset[str]
    unexpected: tuple[str, ...]
    untied: Mapping[str, str]


def bind(
    model: nn.Module,
    entries: Sequence[Entry],
    source: Source,
    *,
    rename: Rename,
    conversions: Sequence[Any] | None,
    dtype: torch.dtype | str | None = None,
    pinned: Callable[[str], torch.dtype | None] = lambda _: None,
) -> Binding:
    """Find each parameter and persistent buffer in a checkpoint.

    The names and layouts are those that the library of the model declares; with `rename`, each tensor is stored as it is
    under the name that it says.

    Args:
        model: That the checkpoint is of, wrapped or not.
        entries: Of the model.
        source: The checkpoint.
        rename: From a name in the model, without wrapper prefixes, to a name in the checkpoint; names that a mapping
            lacks stay as they are.
        conversions: In place of those that the library declares.
        dtype: In which floating point parameters on meta will be kept, as `kept_dtypes` takes it.
        pinned: In which dtype a name in the checkpoint's library is kept whatever `dtype` says; None where it says nothing.

    Returns:
        The binding.

    Raises:
        CheckpointError: The checkpoint holds several names of one tied tensor, in different shapes or kinds of dtype or
            behind a conversion; or it does not fit a conversion.
        ConfigurationError: A renamed tensor is not in the model, or renaming and conversions are both given.
    """
    persistent = [entry for entry in entries if entry.persistent]
    if rename is not None:
        if conversions is not None:
            raise ConfigurationError("rename and conversions: expected one of them, got both")
        if isinstance(rename, Mapping):
            _refuse_unknown(rename, entries)
        names = {slot.fqn: _renamed(slot.fqn, rename) for entry in persistent for slot in entry.slots}
        plain = {name: _as_stored(source, name) for name in names.values() if name in source.tensors}
        return _binding(
            persistent,
            names,
            plain,
            source,
            optional=lambda _: False,
            tied_to=lambda _: None,
            unexpected=tuple(name for name in source.tensors if name not in plain),
        )
    names = {slot.fqn: checkpoint_name_of(slot.fqn) for entry in persistent for slot in entry.slots}
    shapes = {names[slot.fqn]: entry.tensor.shape for entry in persistent for slot in entry.slots}
    declared = declaration_of(model_inside(model), shapes, source.tensors, conversions=conversions)
    tensors = {names[slot.fqn]: entry.tensor for entry in persistent for slot in entry.slots}

    def taken_dtype(group: ConversionGroup) -> torch.dtype:
        own = tensors[group.target]
        if not own.is_floating_point():
            return own.dtype
        if dtype is None or not own.is_meta:
            return pinned(group.target) or own.dtype
        return dtype if isinstance(dtype, torch.dtype) else source.tensors[group.source_names[0]].dtype

    key_map = derive(declared.groups, source.tensors, shapes=shapes, dtype_of=taken_dtype)
    converted = {
        name: Bound(
            source=source,
            name=name,
            shape=recipe.shape,
            pieces=tuple(
                StoredPiece(stored=source.tensors[part.source], piece=part.piece) for part in recipe.parts
            ),
            whole=None,
        )
        for name, recipe in key_map.recipes.items()
    }
    for whole in key_map.whole:
        for name, shape in whole.shapes.items():
            converted[name] = Bound(source=source, name=name, shape=shape, pieces=(), whole=whole)
    return _binding(
        persistent,
        names,
        converted,
        source,
        optional=declared.may_be_absent,
        tied_to=declared.tied_to,
        unexpected=tuple(name for name in declared.unexpected if not declared.may_be_unexpected(name)),
    )


def _binding(
    persistent: Sequence[Entry],
    names: Mapping[str, str],
    found: Mapping[str, Bound],
    source: Source,
    *,
    optional: Callable[[str], bool],
    tied_to: Callable[[str], str | None],
    unexpected: tuple[str, ...],
) -> Binding:
    bound: dict[str, Bound] = {}
    aliases: list[Alias] = []
    absent: list[str] = []
    for entry in persistent:
        fqn_of: dict[str, str] = {}
        for slot in entry.slots:
            fqn_of.setdefault(names[slot.fqn], slot.fqn)
        held = [name for name in fqn_of if name in found]
        if not held:
            absent.append(entry.fqn)
            continue
        bound[entry.fqn] = found[held[0]]
        for name in held[1:]:
            alias = Alias(fqn=fqn_of[name], of=entry.fqn, bound=found[name])
            _require_comparable(alias, found[held[0]])
            if alias.bound.stored:  # one without elements is equal
                aliases.append(alias)
    of_name = {names[fqn]: fqn for fqn in bound}
    further = {tied_to(name): fqn for name, fqn in of_name.items()}  # a file may hold either name
    tied = {fqn: of_name.get(tied_to(names[fqn]) or "", further.get(names[fqn])) for fqn in absent}
    return Binding(
        bound=bound,
        aliases=tuple(aliases),
        absent=tuple(absent),
        optional=frozenset(fqn for fqn in absent if optional(names[fqn])),
        unexpected=unexpected,
        untied={fqn: other for fqn, other in tied.items() if other is not None},
    )


def _as_stored(source: Source, name: str) -> Bound:
    stored = source.tensors[name]
    return Bound(source=source, name=name, shape=stored.shape, pieces=as_stored(stored), whole=None)


def check_bound(entries: Sequence[Entry], bound: Mapping[str, Bound]) -> None:
    """Raise unless every bound tensor has the model's shape and a dtype that can become the model's.

    Raises:
        ShapeMismatchError: Naming tensor, file and both shapes.
        CheckpointError: Naming tensor, file and both dtypes.
    """
    for entry in entries:
        if entry.role == "attribute" or entry.fqn not in bound:
            continue
        of = bound[entry.fqn]
        dtypes = {stored.dtype for stored in of.stored}
        if tuple(entry.tensor.shape) != of.shape:
            raise ShapeMismatchError(
                f"{_mismatch(entry, of, dtypes)} Check that config.json belongs to this checkpoint."
            )
        if not all(_castable(dtype, entry.tensor.dtype) for dtype in dtypes):
            raise CheckpointError(
                f"{_mismatch(entry, of, dtypes)} A quantised weight needs its scales: use an unquantised checkpoint, or build the "
                "model in the checkpoint's dtype."
            )


def _mismatch(entry: Entry, of: Bound, dtypes: Collection[torch.dtype]) -> str:
    return (
        f"{entry.fqn}: expected {tuple(entry.tensor.shape)} {dtype_name(entry.tensor.dtype)} from the model, got {of.shape} "
        f"{' + '.join(sorted(map(dtype_name, dtypes)))} of {of.place}."
    )


def nothing_bound(entries: Sequence[Entry]) -> Binding:
    """Return what is on record of a model that has no checkpoint: all of its values are absent from it."""
    names = tuple(entry.fqn for entry in entries if entry.persistent)
    return Binding(bound={}, aliases=(), absent=names, optional=frozenset(), unexpected=(), untied={})


def permitted(
    absent: Sequence[str],
    missing: str | Sequence[str],
    *,
    name: str,
    optional: Collection[str] = (),
    unexpected: Sequence[str] = (),
    untied: Mapping[str, str] | None = None,
) -> frozenset[str]:
    """Return what may be absent from a checkpoint.

    Args:
        absent: Fqns that the checkpoint lacks.
        missing: `"error"`, `"init"`, or patterns of names.
        name: Of the checkpoint, for the message.
        optional: Fqns that may be absent whatever `missing` says.
        unexpected: Names that the checkpoint holds and nothing in the model takes, for the message.
        untied: Of `absent`, as in `Binding`; only a pattern permits one.

    Returns:
        All of `absent`.

    Raises:
        CheckpointError: Listing the names that no pattern permits.
    """
    is_word = missing in ("error", "init")
    patterns = [] if is_word else [missing] if isinstance(missing, str) else list(missing)
    for fqn, other in (untied or {}).items():
        if not any(fnmatchcase(fqn, pattern) for pattern in patterns):
            raise CheckpointError(
                f"{name}: expected {fqn} to be the same parameter as {other}, which the model's class ties it to, got two, and values "
                f"of {other} alone: sharding the two apart, to_empty, or an assignment to one of them has broken the tie. Shard both "
                "modules in one call, fully_shard([embedding, head]); after to_empty or an assignment call model.tie_weights(). "
                f"missing=[{fqn!r}] makes it a parameter of its own, with new values."
            )
    if missing == "init":
        return frozenset(absent)
    refused = [
        fqn
        for fqn in absent
        if fqn not in optional and not any(fnmatchcase(fqn, pattern) for pattern in patterns)
    ]
    if refused:
        raise CheckpointError(
            f"{name}: expected a value for every parameter, got none for {listed(refused)}. If these are new, for "
            "example a head, pass missing='init' or a list of name patterns; if not, the checkpoint is incomplete or "
            "belongs to another class." + _renaming_remedy(unexpected)
        )
    return frozenset(absent)


def _renaming_remedy(unexpected: Sequence[str]) -> str:
    if not unexpected:
        return ""
    return (
        f" It holds {listed(unexpected)}, which the model does not take: where these are the same tensors under other names, "
        "shardwise.materialize takes rename=."
    )


def _require_comparable(alias: Alias, first: Bound) -> None:
    other = alias.bound
    pairs = list(zip(first.stored, other.stored, strict=False))
    if (
        first.shape == other.shape
        and _is_as_stored(first)
        and _is_as_stored(other)
        and all(_castable(theirs.dtype, ours.dtype) for ours, theirs in pairs)
    ):
        return
    got = " and ".join(
        f"{of.name} {of.shape} {' + '.join(sorted({dtype_name(t.dtype) for t in of.stored}))} in "
        f"{of.stored[0].file if of.stored else of.source.name}"
        for of in (first, other)
    )
    if first.shape == other.shape and not (_is_as_stored(first) and _is_as_stored(other)):
        # rename= would leave the conversion out.
        remedy = (
            "A conversion makes at least one of them, so that stored bytes do not say whether they are equal. If they are, use "
            f"load_pretrained(defer=False), where transformers compares, or leave {other.name} out of the checkpoint; if not, load "
            "the model untied (tie_word_embeddings=False)."
        )
    else:
        remedy = (
            "Build or load the model untied (tie_word_embeddings=False), or call shardwise.materialize with "
            f"rename={{{alias.fqn!r}: {first.name!r}}}."
        )
    raise CheckpointError(
        f"{first.source.name}: expected one tensor for {alias.of} = {alias.fqn}, which the model ties, got {got}. {remedy}"
    )


def _is_as_stored(bound: Bound) -> bool:
    if bound.whole is not None or len(bound.stored) > 1:
        return False
    return all(bound.shape == stored.shape and bound.pieces == as_stored(stored) for stored in bound.stored)


def _castable(stored: torch.dtype, wanted: torch.dtype) -> bool:
    if stored == wanted:
        return True
    both_float = stored.is_floating_point and wanted.is_floating_point
    # Without its scales an 8-bit float is not the weight, and nothing here makes scales.
    return both_float and min(stored.itemsize, wanted.itemsize) > 1


def _renamed(fqn: str, rename: Mapping[str, str] | Callable[[str], str]) -> str:
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
