"""What `load_pretrained` is called with, checked before anything is looked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from shardwise.errors import ConfigurationError

# Classes of transformers, and subclasses of them, that have a `from_pretrained` and give no model.
_NO_MODELS = (
    "AutoConfig",
    "AutoFeatureExtractor",
    "AutoImageProcessor",
    "AutoProcessor",
    "AutoTokenizer",
    "FeatureExtractionMixin",
    "GenerationConfig",
    "ImageProcessingMixin",
    "PreTrainedConfig",
    "PretrainedConfig",
    "PreTrainedTokenizerBase",
    "ProcessorMixin",
)
_CALL = "load_pretrained(AutoModelForCausalLM, 'path-or-hub-id')"


def check_pretrained_arguments(model_cls: Any, name: Any, config_kwargs: Mapping[str, Any]) -> None:
    """Refuse what is not a class of models and the name of a checkpoint, and the old name of an argument.

    Raises:
        ConfigurationError: Saying which of them is wrong, and how.
    """
    if isinstance(model_cls, (str, os.PathLike)):
        if isinstance(name, type):
            raise ConfigurationError(
                f"load_pretrained: expected a model class first and a directory or hub id second, got them the other way round. "
                f"Call load_pretrained({name.__name__}, {os.fspath(model_cls)!r})."
            )
        raise ConfigurationError(
            f"load_pretrained: expected a model class first, got the text {os.fspath(model_cls)!r}. Import the class and pass it "
            f"itself: {_CALL}."
        )
    if not isinstance(model_cls, type):
        found = "a model" if isinstance(model_cls, nn.Module) else "an object"
        raise ConfigurationError(
            f"load_pretrained: expected a model class first, got {found} of class {type(model_cls).__name__}. Pass a class: {_CALL}."
        )
    # By name: to look the classes up imports most of transformers.
    if not hasattr(model_cls, "from_pretrained") or any(
        cls.__name__ in _NO_MODELS for cls in model_cls.__mro__
    ):
        raise ConfigurationError(
            f"load_pretrained: expected a class whose from_pretrained gives a model, got {model_cls.__name__}. Tokenizers, "
            "processors and configs are loaded with their own from_pretrained on every rank; a module of your own is "
            "filled by shardwise.materialize."
        )
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise ConfigurationError(
            f"load_pretrained: expected a directory or hub id second, got {name!r}. Call {_CALL}."
        )
    if "torch_dtype" in config_kwargs:
        raise ConfigurationError(
            f"load_pretrained: torch_dtype={config_kwargs['torch_dtype']} is called dtype= here."
        )
