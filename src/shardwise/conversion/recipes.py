"""From what a model library declares to where each element of each tensor of the model is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shardwise.checkpoint import StoredTensor
from shardwise.conversion.groups import ConversionGroup
from shardwise.conversion.pieces import whole
from shardwise.conversion.tracing import NotTraceableError, Part, TracedTensor
from shardwise.errors import UnsupportedFormatError


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
        reason: Why it cannot be looked up element by element.
    """

    group: ConversionGroup
    shapes: Mapping[str, tuple[int, ...]]
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


def derive(groups: Sequence[ConversionGroup], stored: Mapping[str, StoredTensor]) -> KeyMap:
    """Find out what each conversion does with the elements of its sources, from their names and shapes alone.

    Args:
        groups: Of the model.
        stored: What the checkpoint holds, by checkpoint name.

    Returns:
        The map.

    Raises:
        UnsupportedFormatError: A conversion fails on tensors of these shapes.
    """
    recipes: dict[str, Recipe] = {}
    wholes: list[WholeGroup] = []
    for group in groups:
        if group.convert is None:
            source = stored[group.source_names[0]]
            parts = (Part(source=source.name, piece=whole(source.shape)),) if math.prod(source.shape) else ()
            recipes[group.target] = Recipe(name=group.target, shape=source.shape, parts=parts)
            continue
        try:
            found = _traced(group, stored)
        except NotTraceableError as error:
            wholes.append(WholeGroup(group=group, shapes=_shapes(group, stored), reason=str(error)))
        else:
            recipes.update(found)
    return KeyMap(recipes=recipes, whole=tuple(wholes))


def _traced(group: ConversionGroup, stored: Mapping[str, StoredTensor]) -> dict[str, Recipe]:
    # One dtype for all: the loader casts each source to the model's dtype before it converts.
    made = _run(
        group,
        {
            pattern: [TracedTensor.of_source(name, stored[name].shape, torch.float32) for name in names]
            for pattern, names in group.sources.items()
        },
    )
    recipes = {}
    for name, tensor in made.items():
        if not isinstance(tensor, TracedTensor):
            raise NotTraceableError(f"{name} is made anew, as a {type(tensor).__name__}")
        shape = tuple(tensor.shape)
        if sum(part.piece.numel for part in tensor.parts) != math.prod(shape):
            raise NotTraceableError(f"{name} is not made of its sources' elements alone")
        recipes[name] = Recipe(name=name, shape=shape, parts=tensor.parts)
    return recipes


def _shapes(group: ConversionGroup, stored: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    made = _run(
        group,
        {
            pattern: [torch.empty(stored[name].shape, device="meta") for name in names]
            for pattern, names in group.sources.items()
        },
    )
    return {name: tuple(tensor.shape) for name, tensor in made.items()}


def _run(group: ConversionGroup, tensors: Mapping[str, list[torch.Tensor]]) -> Mapping[str, torch.Tensor]:
    if group.convert is None:
        raise UnsupportedFormatError(f"{group.target}: expected a conversion, got none")
    try:
        with torch.no_grad():
            return group.convert({pattern: list(values) for pattern, values in tensors.items()})
    except NotTraceableError:
        raise
    except Exception as error:
        shapes = {
            f"{pattern} x {len(values)}": tuple(values[0].shape) if values else ()
            for pattern, values in tensors.items()
        }
        raise UnsupportedFormatError(
            f"{group.target}: expected the conversion {group.operations} to work on what the checkpoint holds, {shapes}, got "
            f"{type(error).__name__}: {error}. Does config.json belong to this checkpoint? If transformers itself loads it, "
            "use load_pretrained(defer=False)."
        ) from error
