"""What lies beside the weights of a model: config, generation config, its own code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from shardwise.conversion import is_transformers_model
from shardwise.errors import ConfigurationError
from shardwise.tensors import dtype_name


def check_tokenizer(tokenizer: Any) -> None:
    """Raise unless a tokenizer can be saved.

    Raises:
        ConfigurationError: It has no `save_pretrained`.
    """
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ConfigurationError(
            f"tokenizer: expected a tokenizer or processor with save_pretrained, or None, got {type(tokenizer).__name__}"
        )


def class_of(model: nn.Module) -> Any:
    """Return the class that a model had before `fully_shard` put its own in front."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def write_config(model: nn.Module, directory: Path, *, dtype: torch.dtype | None) -> None:
    """Write config, generation config and the model's own code, as `save_pretrained` does; nothing for other modules.

    The model and its config stay as they are.

    Args:
        model: Any module.
        directory: To write to.
        dtype: In which its parameters are written; None where none is of floating point.
    """
    if is_transformers_model(model):
        _write_config(model, directory, dtype)


def _has_head_of_its_own(model: Any) -> bool:
    """Whether a model whose class ties embedding and head has two weights all the same."""
    if not model._tied_weights_keys:
        return False
    try:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
    except NotImplementedError:  # a class without an embedding of tokens
        return False
    embedding, head = (getattr(end, "weight", None) for end in ends)
    return isinstance(embedding, nn.Parameter) and isinstance(head, nn.Parameter) and embedding is not head


def _write_config(model: Any, directory: Path, dtype: torch.dtype | None) -> None:
    cls = class_of(model)
    config = copy.deepcopy(model.config)
    config.dtype = dtype_name(dtype or model.dtype)
    config.architectures = [cls.__name__]
    if _has_head_of_its_own(model):
        # A load would tie what was saved apart, and transformers 4 overwrite one by the other.
        for each in (config, config.get_text_config(decoder=True)):
            each.tie_word_embeddings = False
    generation = copy.deepcopy(model.generation_config) if model.can_generate() else None
    if generation is not None and hasattr(config, "_get_non_default_generation_parameters"):  # transformers 4
        for name, value in config._get_non_default_generation_parameters().items():
            setattr(generation, name, value)
            setattr(config, name, None)
    if cls._auto_class is not None:
        from transformers.dynamic_module_utils import custom_object_save

        # It asks the object for its class alone, and the model's is torch's by now.
        custom_object_save(object.__new__(cls), directory, config=config)
    config.save_pretrained(directory)
    if generation is not None:
        generation.save_pretrained(directory)
