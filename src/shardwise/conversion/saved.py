"""What a checkpoint of a model consists of: its tensors' names, and which element of the model goes where in each.

The way of a load, walked backwards: what the model's library declares about saving is run on tensors without values, and the
pieces that come out are turned round, so that they say of a tensor to be written which places of the model's tensors it takes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from shardwise.checkpoint import StoredTensor
from shardwise.conversion.declared import generation, is_transformers_model
from shardwise.conversion.groups import ConversionGroup, renamed_group
from shardwise.conversion.pieces import Piece
from shardwise.conversion.recipes import Recipe, WholeGroup, derive
from shardwise.conversion.tracing import NotTraceableError, backwards
from shardwise.errors import ConfigurationError, listed


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A piece of a tensor to be written, and the tensor of the model that it is taken from.

    Args:
        fqn: Of the tensor in the model.
        piece: From the tensor to be written, as its source, to places in the model's.
    """

    fqn: str
    piece: Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """A tensor of a checkpoint to be written.

    Args:
        name: Checkpoint name.
        shape: In elements.
        dtype: Of its elements.
        taken: Pieces that together are all of it; none where it is empty, or made by `whole`.
        whole: Makes it out of whole tensors of the model; None where it consists of pieces.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    taken: tuple[Taken, ...]
    whole: WholeGroup | None


def saved_tensors(
    model: nn.Module, held: Mapping[str, StoredTensor], ties: Sequence[Sequence[str]]
) -> tuple[SavedTensor, ...]:
    """Return what a checkpoint of a model consists of, in the order in which its library saves it.

    Args:
        model: Any module. A transformers model's own declaration counts; others are saved under their names as they are.
        held: Every persistent tensor of it by each of its names, in the order of its state dict, in the dtype in which it is to
            be written.
        ties: Names of one tensor, for each tensor that has several.

    Raises:
        ConfigurationError: The model's library knows no way from the model's layout to its checkpoints'.
        UnsupportedParameterError: The model's class does not declare a tie, so that a load would not make it again.
    """
    shapes = {name: torch.Size(tensor.shape) for name, tensor in held.items()}
    if is_transformers_model(model):
        groups: Sequence[ConversionGroup] = generation().saved_groups(model, shapes, ties)
    else:
        further = {name for names in ties for name in names[1:]}
        groups = [renamed_group(name, name) for name in held if name not in further]
    found: dict[str, SavedTensor] = {}
    for group in groups:
        for saved in _saved_of(group, held, shapes):
            if saved.name in found:
                raise ConfigurationError(
                    f"{saved.name}: expected one tensor of this name in the checkpoint, got two, the second from "
                    f"{listed(group.source_names)}. Report this model to shardwise."
                )
            found[saved.name] = saved
    return tuple(found.values())


def _saved_of(
    group: ConversionGroup, held: Mapping[str, StoredTensor], shapes: Mapping[str, torch.Size]
) -> list[SavedTensor]:
    dtype = functools.reduce(torch.promote_types, (held[name].dtype for name in group.source_names))
    key_map = derive((group,), held, shapes=shapes, dtype_of=lambda _: dtype)
    wholes = list(key_map.whole)
    try:
        return [_turned_round(recipe, dtype, held) for recipe in key_map.recipes.values()] + [
            saved for whole in wholes for saved in _made_by(whole)
        ]
    except (
        NotTraceableError
    ) as error:  # elements are known, but their places are not those of a box of the model's tensor
        recipes = key_map.recipes
        whole = WholeGroup(
            group=group,
            shapes={name: recipe.shape for name, recipe in recipes.items()},
            taken_dtype=dtype,
            made_dtypes={},
            reason=str(error),
        )
        return _made_by(whole)


def _turned_round(recipe: Recipe, dtype: torch.dtype, held: Mapping[str, StoredTensor]) -> SavedTensor:
    taken = tuple(
        Taken(
            fqn=part.source,
            piece=backwards(part.piece, shape=recipe.shape, source_shape=held[part.source].shape),
        )
        for part in recipe.parts
    )
    return SavedTensor(name=recipe.name, shape=recipe.shape, dtype=dtype, taken=taken, whole=None)


def _made_by(whole: WholeGroup) -> list[SavedTensor]:
    if not whole.shapes:
        raise ConfigurationError(
            f"{listed(whole.group.source_names)}: expected a conversion that says without values what it makes, got "
            f"{whole.group.operations}, which does not: {whole.reason}. Save this model with save_pretrained."
        )
    return [
        SavedTensor(
            name=name,
            shape=shape,
            dtype=whole.made_dtypes.get(name, whole.taken_dtype),
            taken=(),
            whole=whole,
        )
        for name, shape in whole.shapes.items()
    ]
