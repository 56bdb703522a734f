"""From what a model library declares to where each element of each tensor of the model is stored."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from shardwise.checkpoint import StoredTensor
from shardwise.conversion.groups import ConversionGroup, Convert
from shardwise.conversion.pieces import whole
from shardwise.conversion.tracing import NotTraceableError, Part, TracedTensor

_log = logging.getLogger("shardwise")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A tensor of the model as pieces of stored tensors.

    Args:
        name: In the model.
        shape: Of the full tensor, in elements.
        parts: That together fill it once.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeGroup:
    """A conversion that must see whole tensors.

    Args:
        group: That does it.
        shapes: Of its results, by their names in the model.
        taken_dtype: In which it takes floating point sources, so far as `made_dtypes` goes.
        made_dtypes: Of results that come out in another dtype than that, by their names in the model.
        reason: Why it cannot be looked up element by element.
    """

    group: ConversionGroup
    shapes: Mapping[str, tuple[int, ...]]
    taken_dtype: torch.dtype
    made_dtypes: Mapping[str, torch.dtype]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMap:
    """Where the tensors of a model are in a checkpoint.

    Args:
        recipes: By name in the model.
        whole: Conversions that must see whole tensors; their results are not among the recipes.
    """

    recipes: Mapping[str, Recipe]
    whole: tuple[WholeGroup, ...]


def derive(
    groups: Sequence[ConversionGroup],
    stored: Mapping[str, StoredTensor],
    *,
    shapes: Mapping[str, Sequence[int]],
    dtype_of: Callable[[ConversionGroup], torch.dtype],
) -> KeyMap:
    """Find out what each conversion does with the elements of its sources, from their names and shapes alone.

    Nothing is raised of a conversion that fails on tensors without values: only values tell whether it works.

    Args:
        groups: Of the model.
        stored: What the checkpoint holds, by checkpoint name.
        shapes: Of the model's tensors, by name.
        dtype_of: In which dtype a conversion takes floating point sources: the loader casts each before it converts.

    Returns:
        The map.
    """
    recipes: dict[str, Recipe] = {}
    wholes: list[WholeGroup] = []
    for group in groups:
        if group.convert is None:
            source = stored[group.source_names[0]]
            parts = (Part(source=source.name, piece=whole(source.shape)),) if math.prod(source.shape) else ()
            recipes[group.target] = Recipe(name=group.target, shape=source.shape, parts=parts)
            continue
        dtype = dtype_of(group)
        try:
            found = _traced(group, group.convert, stored, dtype)
        except Exception as error:  # of somebody else's code, which may want values
            reason = (
                str(error) if isinstance(error, NotTraceableError) else f"{type(error).__name__}: {error}"
            )
            wholes.append(_foreseen(group, group.convert, stored, shapes, dtype, reason))
        else:
            recipes.update(found)
    return KeyMap(recipes=recipes, whole=tuple(wholes))


def _traced(
    group: ConversionGroup, convert: Convert, stored: Mapping[str, StoredTensor], dtype: torch.dtype
) -> dict[str, Recipe]:
    sources: dict[str, list[torch.Tensor]] = {
        pattern: [TracedTensor.of_source(name, stored[name].shape, dtype) for name in names]
        for pattern, names in group.sources.items()
    }
    with torch.no_grad():
        made = convert(sources)
    recipes = {}
    for name, tensor in made.items():
        if not isinstance(tensor, TracedTensor):
            raise NotTraceableError(f"{name} is made anew, as a {type(tensor).__name__}")
        if tensor.dtype != dtype:
            raise NotTraceableError(f"{name} is made in {tensor.dtype} of sources in {dtype}")
        shape = tuple(tensor.shape)
        if sum(part.piece.numel for part in tensor.parts) != math.prod(shape):
            raise NotTraceableError(f"{name} is not made of its sources' elements alone")
        recipes[name] = Recipe(name=name, shape=shape, parts=tensor.parts)
    return recipes


def _foreseen(
    group: ConversionGroup,
    convert: Convert,
    stored: Mapping[str, StoredTensor],
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    reason: str,
) -> WholeGroup:
    """Return what a conversion of whole tensors will make: as it says on meta; where it wants values, what the model expects."""
    sources = {
        pattern: [torch.empty(stored[name].shape, dtype=dtype, device="meta") for name in names]
        for pattern, names in group.sources.items()
    }
    of_results = {name: tuple(shapes[name]) for name in group.targets}
    made_dtypes = {}
    try:
        with torch.no_grad(), torch.device("meta"):
            made = convert(sources)
            of_results = {name: tuple(tensor.shape) for name, tensor in made.items()}
            made_dtypes = {name: tensor.dtype for name, tensor in made.items() if tensor.dtype != dtype}
    except Exception:
        _log.debug("%s: %s wants values to run", group.target, group.operations, exc_info=True)
    return WholeGroup(
        group=group, shapes=of_results, taken_dtype=dtype, made_dtypes=made_dtypes, reason=reason
    )
