"""PEFT adapters on the facade's model, before it is wrapped."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, cast

from torch import nn

from shardwise.errors import ConfigurationError, MissingDependencyError
from shardwise.strategies import AccelerateStrategy, NativeFSDPStrategy


def put_adapter(
    strategy: AccelerateStrategy | NativeFSDPStrategy,
    model: nn.Module,
    adapter_name: str,
    config_or_dir: Any,
    *,
    is_trainable: bool,
    kwargs: dict[str, Any],
) -> nn.Module:
    """Put a new adapter, or a saved one, into a model.

    Args:
        strategy: That the model is of.
        model: Not wrapped; with adapters already, or without.
        adapter_name: Of the adapter in the model.
        config_or_dir: A PEFT config, or the directory or hub id of a saved adapter.
        is_trainable: Whether a saved one is trained further.
        kwargs: Of `peft.get_peft_model`.

    Returns:
        The PEFT model.

    Raises:
        ConfigurationError: `config_or_dir` is neither.
        MissingDependencyError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError(
            "add_adapter_to_model needs peft. Install it with: pip install 'shardwise[peft]'"
        )
    if isinstance(config_or_dir, (str, os.PathLike)):
        if kwargs:
            raise ConfigurationError(
                f"add_adapter_to_model: {', '.join(sorted(kwargs))} is for a new adapter, got the directory of a saved one"
            )
        return strategy.load_adapter(
            model, str(config_or_dir), adapter_name=adapter_name, is_trainable=is_trainable
        )
    import peft

    if not isinstance(config_or_dir, peft.PeftConfig):
        raise ConfigurationError(
            "add_adapter_to_model: expected a PEFT config or the directory of a saved adapter, got "
            f"{type(config_or_dir).__name__}"
        )
    # Where every rank holds the base's values, PEFT would draw the adapter's from each rank's own random numbers. On meta
    # they are made at the wrap, the same on all ranks.
    on_meta = not strategy.memory_efficient_init
    if isinstance(model, peft.PeftModel):
        model.add_adapter(adapter_name, config_or_dir, low_cpu_mem_usage=on_meta, **kwargs)
        return cast(nn.Module, model)
    return cast(
        nn.Module,
        peft.get_peft_model(
            model, config_or_dir, adapter_name=adapter_name, low_cpu_mem_usage=on_meta, **kwargs
        ),
    )
