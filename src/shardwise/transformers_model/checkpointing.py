"""Gradient checkpointing of transformers, under the name that the installed release gives it.

Newer releases of transformers 5 call it activation checkpointing and warn at the old name, which 4.57 has alone.
`tests/distributed/test_transformers_model.py` fails where neither name works.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from shardwise.errors import ConfigurationError


def set_checkpointing(model: nn.Module, enabled: bool, options: Mapping[str, Any]) -> None:
    """Let a model's layers compute their activations again in backward, or keep them.

    Args:
        model: Of transformers, perhaps with adapters; wrapped or not.
        enabled: Which of the two.
        options: Of `torch.utils.checkpoint.checkpoint`.

    Raises:
        ConfigurationError: The model cannot do it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigurationError(
            f"gradient checkpointing: expected a transformers model that supports it, got {type(model).__name__}. Use "
            "fsdp_config={'activation_checkpointing': True}."
        )
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if not enabled:
        getattr(model, f"{word}_checkpointing_disable")()
        return
    getattr(model, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": dict(options)})
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # a cache would grow once more when backward recomputes it
