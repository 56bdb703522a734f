"""Which strategies there are."""

from __future__ import annotations

from typing import Final

from shardwise.errors import ConfigurationError
from shardwise.strategies.accelerate import AccelerateStrategy
from shardwise.strategies.accelerate_compat import require_supported
from shardwise.strategies.native import NativeFSDPStrategy
from shardwise.strategies.precision import check_fp8, check_mixed_precision, check_native_precision

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


def check_strategy_here(name: str, *, mixed_precision: str, device_type: str) -> None:
    """Raise unless a strategy can be had on this machine, before there are ranks to make it on.

    Args:
        name: Of the strategy.
        mixed_precision: Compute dtype.
        device_type: Of the ranks' devices.

    Raises:
        ConfigurationError: There is no such strategy, or it does not compute in this precision on such devices (with `memory_efficient_init`).
        MissingDependencyError: Naming the extra.
    """
    check_strategy(name)
    if name == NativeFSDPStrategy.name:
        check_native_precision(mixed_precision, device_type=device_type)
    else:
        require_supported()
        check_mixed_precision(mixed_precision, device_type=device_type)
        check_fp8(mixed_precision, device_type=device_type, efficient=True)
