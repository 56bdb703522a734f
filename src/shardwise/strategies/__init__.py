"""The two strategies: FSDP2 with torch alone, and through Accelerate."""

from shardwise.strategies.accelerate import AccelerateStrategy
from shardwise.strategies.choosing import STRATEGIES, check_strategy, check_strategy_here
from shardwise.strategies.load_context import fsdp_pretrained_load_context
from shardwise.strategies.native import NativeFSDPStrategy
from shardwise.strategies.peft_extra import require_peft

__all__ = [
    "STRATEGIES",
    "AccelerateStrategy",
    "NativeFSDPStrategy",
    "check_strategy",
    "check_strategy_here",
    "fsdp_pretrained_load_context",
    "require_peft",
]
