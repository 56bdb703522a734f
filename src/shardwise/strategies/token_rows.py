"""Trainable rows of single tokens, of PEFT, on a model whose values are still in its checkpoint.

They start as rows of the embedding, and PEFT keeps these rows in a buffer beside them: both are read from where the embedding
is. Rows that an embedding was given after it was loaded are in no checkpoint, so there PEFT's rule refuses the adapter.

Source: `peft.tuners.trainable_tokens.layer.TrainableTokensLayer.update_layer`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from shardwise.materialization import Bound, entries_of
from shardwise.plan import StoredPiece
from shardwise.tensors import Region


def token_rows(model: nn.Module, bound: Mapping[str, Bound]) -> dict[str, Bound]:
    """Return where the rows of single tokens are that adapters of a model start from.

    Args:
        model: Perhaps with adapters; on meta.
        bound: Where its other values are, by fqn.

    Returns:
        By fqn, of parameters and buffers; without those that do not start as stored rows.
    """
    layers = sys.modules.get("peft.tuners.trainable_tokens.layer")
    if layers is None:
        return {}
    fqn_of = {id(entry.tensor): entry.fqn for entry in entries_of(model)}
    found: dict[str, Bound] = {}
    for layer in model.modules():
        if not isinstance(layer, layers.TrainableTokensLayer):
            continue
        of_layer: Any = layer
        base = bound.get(fqn_of.get(id(of_layer.get_base_layer().weight), ""))
        for adapter, tokens in of_layer.token_indices.items():
            rows = _rows_of(base, tokens) if base is not None and _starts_as_rows(model, adapter) else None
            for holder in (of_layer.trainable_tokens_delta, of_layer.trainable_tokens_original):
                if rows is not None and holder[adapter].is_meta:
                    found[fqn_of[id(holder[adapter])]] = rows
    return found


def _starts_as_rows(model: nn.Module, adapter: str) -> bool:
    configs = (getattr(module, "peft_config", {}).get(adapter) for module in model.modules())
    return all(getattr(config, "init_weights", True) is not False for config in configs)


def _rows_of(base: Bound, tokens: Sequence[int]) -> Bound | None:
    if base.whole is not None:
        return None
    width = base.shape[1:]
    pieces = []
    for row, token in enumerate(tokens):
        stored_row = Region(start=(token, *(0 for _ in width)), stop=(token + 1, *width))
        to_its_place = (row, *(0 for _ in width))
        pieces += [
            StoredPiece(stored=each.stored, piece=piece.moved(to_its_place))
            for each in base.pieces
            for piece in each.piece.within(stored_row)
        ]
    shape = (len(tokens), *width)
    if sum(each.piece.numel for each in pieces) != math.prod(shape):
        return None
    return dataclasses.replace(base, shape=shape, pieces=tuple(pieces))
