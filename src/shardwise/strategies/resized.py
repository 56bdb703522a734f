"""Embeddings that are resized while their values are still in a checkpoint.

transformers gives the embedding new rows in place and makes a new output head. The rows that the checkpoint has are read from
it; further ones are initialised as the model initialises them, which is what `mean_resizing=False` asks for. A mean of the old
rows would need their values: on a deferred model it is refused, and on a rank without values it is left to the one that has them.

Source: `transformers.PreTrainedModel.resize_token_embeddings`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from shardwise.errors import CallOrderError, ConfigurationError, ShapeMismatchError
from shardwise.materialization import Bound, Entry, named_modules_of, resting_collector
from shardwise.plan import StoredPiece
from shardwise.tensors import Region

_OF_MEANS = (
    "_init_added_embeddings_weights_with_mean",
    "_init_added_lm_head_weights_with_mean",
    "_init_added_lm_head_bias_with_mean",
)


def resized(entry: Entry, bound: Bound) -> tuple[Bound, bool]:
    """Cut a binding to the rows that a tensor has now.

    Args:
        entry: Of the model, of its own shape.
        bound: Where its values were when it was loaded.

    Returns:
        The binding, and whether the tensor has rows that the checkpoint lacks.

    Raises:
        ShapeMismatchError: It differs in more than its rows.
        ConfigurationError: Its rows are made by a conversion that must see whole tensors.
    """
    shape = tuple(entry.tensor.shape)
    if shape == bound.shape:
        return bound, False
    if shape[1:] != bound.shape[1:] or not shape:
        raise ShapeMismatchError(
            f"{entry.fqn}: expected {bound.shape}, as {bound.place} has it, or another number of rows, got {shape}. Put a new "
            "parameter in its place, or use load_pretrained(defer=False)."
        )
    if bound.whole is not None:
        raise ConfigurationError(
            f"{entry.fqn}: expected a tensor that is stored row by row to resize, got one that {bound.whole.group.operations} "
            "makes. Use load_pretrained(defer=False)."
        )
    rows = Region.whole(shape)
    pieces = tuple(
        StoredPiece(stored=each.stored, piece=piece)
        for each in bound.pieces
        for piece in each.piece.within(rows)
    )
    return dataclasses.replace(bound, shape=shape, pieces=pieces), shape[0] > bound.shape[0]


def output_head(model: nn.Module) -> nn.Module | None:
    """Return a transformers model's output head, within PEFT's layers around it; None where it has none."""
    return _inside(model, "get_output_embeddings")


def is_resized_head(model: nn.Module, bound: Mapping[str, Bound]) -> bool:
    """Return whether a model's output head was made anew for another number of rows.

    Args:
        model: Of transformers.
        bound: Of its former head, by the name in it.
    """
    weight = getattr(output_head(model), "weight", None)
    rows = getattr(_inside(model, "get_input_embeddings"), "weight", None)
    former = bound.get("weight")
    if weight is None or rows is None or former is None or not weight.is_meta:
        return False
    return bool(weight.shape[0] == rows.shape[0] != former.shape[0])


def refuse_means(model: nn.Module) -> None:
    """Make `mean_resizing=True` an error that names the remedy, until `restore_means`."""
    _replace(model, _OF_MEANS, _refuse)


def skip_means(model: nn.Module) -> None:
    """Leave the means of `mean_resizing=True` to the rank that has values, until `restore_means`."""
    _replace(model, _OF_MEANS, _skip)


def restore_means(model: nn.Module) -> None:
    """Give a model its own methods back."""
    for _, module in named_modules_of(model):
        for name in _OF_MEANS:
            vars(module).pop(name, None)


def refuse_resizing(model: nn.Module) -> None:
    """Make resizing the embeddings of a wrapped model an error that names the remedy: transformers would mix shards and full tensors."""
    _replace(model, ("resize_token_embeddings",), _refuse_resizing)


def _inside(model: nn.Module, method: str) -> nn.Module | None:
    get: Any = getattr(model, method, None)
    found = get() if callable(get) else None
    while found is not None:
        inner = getattr(found, "original_module", getattr(found, "base_layer", None))
        if not isinstance(inner, nn.Module):
            break
        found = inner
    return found if isinstance(found, nn.Module) else None


def _replace(model: nn.Module, names: tuple[str, ...], method: Any) -> None:
    # On the object, where transformers looks them up: it offers no hook between the old rows and the new ones.
    with resting_collector():
        for _, module in named_modules_of(model):
            for name in names:
                if hasattr(type(module), name):
                    setattr(module, name, method)


def _refuse(*_: Any, **__: Any) -> None:
    raise ConfigurationError(
        "resize_token_embeddings(mean_resizing=True): expected values of the old rows to take the mean of, got a model whose "
        "values are read at the wrap. Pass mean_resizing=False, which starts new rows as the model does, or load with "
        "load_pretrained(defer=False)."
    )


def _refuse_resizing(*_: Any, **__: Any) -> None:
    raise CallOrderError(
        "resize_token_embeddings: expected a model that is not wrapped yet, got one whose embeddings are sharded. Resize between "
        "load_pretrained and wrap_model; of a trained model, export it and load the export."
    )


def _skip(*_: Any, **__: Any) -> None:
    pass
