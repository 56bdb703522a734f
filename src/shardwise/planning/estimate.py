"""A checkpoint that is not there: what a model of a config would be stored as."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shardwise.checkpoint import DescribedSource, StoredTensor
from shardwise.materialization import entries_of

_FILE_BYTES = 5 * 10**9  # as save_pretrained cuts files


def estimated_source(model: nn.Module, *, name: str) -> DescribedSource:
    """Return what a model would be stored as: in its checkpoints' layout where transformers can go back to it, else its own.

    Args:
        model: On meta, of a config.
        name: What messages call it.
    """
    # Of a tied tensor the first name is stored.
    own = {entry.fqn: entry.tensor.detach() for entry in entries_of(model) if entry.persistent}
    return DescribedSource(name, _placed(_as_stored(model, own)))


def _as_stored(model: Any, tensors: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4.57 keeps tensors as they are stored
        return tensors
    on_meta = {name: tensor.to(torch.device("meta")) for name, tensor in tensors.items()}
    known = getattr(model, "_weight_conversions", None)
    try:
        model._weight_conversions = get_model_conversion_mapping(model)
        with torch.no_grad():
            reverted: Mapping[str, torch.Tensor] = revert_weight_conversion(model, on_meta)
    except Exception:  # a conversion without a way back: an estimate from the model's own layout
        return tensors
    finally:
        model._weight_conversions = known
    return reverted


def _placed(tensors: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    files: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if files[-1] and filled + nbytes > _FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += nbytes
    placed: dict[str, StoredTensor] = {}
    for number, names in enumerate(files, start=1):
        # safetensors writes wide dtypes first, each in the order of names.
        start = 0
        for name in sorted(names, key=lambda n: (-tensors[n].element_size(), n)):
            tensor = tensors[name]
            shape = tuple(tensor.shape)
            stop = start + math.prod(shape) * tensor.element_size()
            placed[name] = StoredTensor(
                name=name,
                shape=shape,
                dtype=tensor.dtype,
                file=f"model-{number:05d}-of-{len(files):05d}.safetensors",
                start=start,
                stop=stop,
            )
            start = stop
    return placed
