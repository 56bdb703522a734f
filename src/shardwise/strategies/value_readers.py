"""Constructors that ask a tensor for its value, which one on meta does not have: code of a checkpoint calls `.item()`, or compares.

From transformers 5 on `from_pretrained` builds on meta too, so that such a class does not load there either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shardwise.errors import ConfigurationError


@contextmanager
def constructors_without_values(model_cls: Any) -> Iterator[None]:
    """Name the remedy where a class cannot be built in the body because it reads values.

    Args:
        model_cls: A transformers model or auto class.

    Raises:
        ConfigurationError: It reads values while it is built.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error).lower():
            raise
        name = getattr(model_cls, "__name__", str(model_cls))
        build = f"{name}.from_config(config)" if hasattr(model_cls, "from_config") else f"{name}(config)"
        raise ConfigurationError(
            f"{name}: expected a model that can be built before its values are there, got a constructor that reads values: {error}. "
            "Let it compute from its config. Or build it with values, a whole copy in each rank's host memory, with "
            f"{build}; then fully_shard it and fill it with shardwise.materialize(model, checkpoint)."
        ) from error
