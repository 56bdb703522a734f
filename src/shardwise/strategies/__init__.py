"""The two strategies: FSDP2 with torch alone, and through Accelerate."""

from typing import Final

from shardwise.strategies.accelerate import AccelerateStrategy
from shardwise.strategies.load_context import fsdp_pretrained_load_context
from shardwise.strategies.native import NativeFSDPStrategy

STRATEGIES: Final = {
    AccelerateStrategy.name: AccelerateStrategy,
    NativeFSDPStrategy.name: NativeFSDPStrategy,
}
"""By the name that users choose them by."""

__all__ = ["STRATEGIES", "AccelerateStrategy", "NativeFSDPStrategy", "fsdp_pretrained_load_context"]
