"""PEFT adapters on the facade's model, before it is wrapped."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from shardwise.errors import ConfigurationError
from shardwise.strategies import AccelerateStrategy, NativeFSDPStrategy, require_peft


def put_adapter(
    strategy: AccelerateStrategy | NativeFSDPStrategy,
    model: nn.Module,
    adapter_name: str,
    config_or_dir: Any,
    *,
    is_trainable: bool,
    autocast_adapter_dtype: bool,
) -> nn.Module:
    """Put a new adapter, or a saved one, into a model.

    Args:
        strategy: That the model is of.
        model: Not wrapped; with adapters already, or without.
        adapter_name: Of the adapter in the model.
        config_or_dir: A PEFT config, or the directory or hub id of a saved adapter.
        is_trainable: Whether a saved one is trained further.
        autocast_adapter_dtype: Of `strategy.add_adapter`.

    Returns:
        The PEFT model.

    Raises:
        ConfigurationError: `config_or_dir` is neither.
        MissingDependencyError: peft is not installed.
    """
    require_peft("add_adapter_to_model")
    options: dict[str, Any] = {"adapter_name": adapter_name, "autocast_adapter_dtype": autocast_adapter_dtype}
    if isinstance(config_or_dir, (str, os.PathLike)):
        return strategy.load_adapter(model, str(config_or_dir), is_trainable=is_trainable, **options)
    import peft

    if not isinstance(config_or_dir, peft.PeftConfig):
        raise ConfigurationError(
            "add_adapter_to_model: expected a PEFT config or the directory of a saved adapter, got "
            f"{type(config_or_dir).__name__}"
        )
    return strategy.add_adapter(model, config_or_dir, **options)
