"""From what a user passes to the facade to a strategy and a model that is not wrapped."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from shardwise.errors import ConfigurationError
from shardwise.materialization import Agreement, telling
from shardwise.strategies import AccelerateStrategy, NativeFSDPStrategy, check_strategy
from shardwise.strategies.mesh import ranks_to_tell

# What AutoTokenizer can start from; a directory without any of them has no tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
_HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


def make_strategy(
    name: str, *, ddp_config: Mapping[str, Any] | None, **arguments: Any
) -> AccelerateStrategy | NativeFSDPStrategy:
    """Make a strategy by its name.

    Raises:
        ConfigurationError: It is unknown, or an argument is not for it.
    """
    with telling("TransformersModel", ranks_to_tell(arguments.get("device_mesh"))):
        check_strategy(name)
        if ddp_config is not None and name != AccelerateStrategy.name:
            raise ConfigurationError(
                f"ddp_config: strategy={name!r} has no DistributedDataParallel to configure. Leave ddp_config out, or use "
                "strategy='accelerate'."
            )
    if name == AccelerateStrategy.name:
        return AccelerateStrategy(ddp_config=ddp_config, **arguments)
    return NativeFSDPStrategy(**arguments)


def build_model(
    strategy: AccelerateStrategy | NativeFSDPStrategy,
    agreement: Agreement,
    *,
    model_id: str | os.PathLike[str] | None,
    model_cls: Any,
    config: Any,
    dtype: Any,
    missing: str | Sequence[str],
    defer: bool,
    trust_remote_code: bool,
    config_kwargs: dict[str, Any],
) -> nn.Module:
    """Build a model through a strategy: pretrained, or new from a config alone.

    Raises:
        ConfigurationError: There is neither a model nor a config, or the class is not one of transformers.
        PeerError: Another rank failed.
    """
    with agreement.phase("arguments"):
        model_cls = _class_of(model_cls)
        if model_id is None and config is None:
            raise ConfigurationError(
                "TransformersModel: expected model_id= (a directory or hub id) or config=, got neither. A config alone makes a "
                "new model of random values."
            )
    config_kwargs = {**config_kwargs, "trust_remote_code": trust_remote_code}
    if model_id is None:
        return strategy.from_config(model_cls, config, dtype=dtype, **config_kwargs)
    if config is not None:
        config_kwargs["config"] = copy.deepcopy(config)
    return strategy.load_pretrained(
        model_cls, str(model_id), dtype=dtype, missing=missing, defer=defer, **config_kwargs
    )


def load_tokenizer(
    model_id: str | os.PathLike[str] | None, *, trust_remote_code: bool, config_kwargs: Mapping[str, Any]
) -> Any:
    """Return the tokenizer that lies beside a model; None where there is none."""
    if model_id is None:
        return None
    directory = Path(model_id, config_kwargs.get("subfolder") or "")
    if Path(model_id).is_dir() and not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    access = {key: config_kwargs[key] for key in _HUB_ARGUMENTS if key in config_kwargs}
    return AutoTokenizer.from_pretrained(str(model_id), trust_remote_code=trust_remote_code, **access)


def _class_of(model_cls: Any) -> Any:
    if model_cls is None:
        model_cls = "AutoModelForCausalLM"
    if not isinstance(model_cls, str):
        return model_cls
    import transformers

    found = getattr(transformers, model_cls, None)
    if found is None:
        raise ConfigurationError(
            f"model_cls: expected a class, or the name of one in transformers {transformers.__version__}, got {model_cls!r}"
        )
    return found
