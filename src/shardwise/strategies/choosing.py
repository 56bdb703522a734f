"""Which strategies there are."""

from __future__ import annotations

from typing import Final

from shardwise.errors import ConfigurationError
from shardwise.strategies.accelerate import AccelerateStrategy
from shardwise.strategies.native import NativeFSDPStrategy

STRATEGIES: Final = {
    AccelerateStrategy.name: AccelerateStrategy,
    NativeFSDPStrategy.name: NativeFSDPStrategy,
}
"""By the name that users choose them by."""


def check_strategy(name: str) -> None:
    """Raise unless a strategy has this name.

    Raises:
        ConfigurationError: Listing the names.
    """
    if name not in STRATEGIES:
        raise ConfigurationError(f"strategy: expected one of {', '.join(sorted(STRATEGIES))}, got {name!r}")
