"""What torch's optimizers keep for each parameter, and what a step of theirs needs for a moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from shardwise.errors import ConfigurationError, did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerStates:
    """Of one optimizer, for each parameter that it trains.

    Args:
        name: What the user calls it.
        tensors: Kept, of the shard's shape and dtype (`zeros_like(p)`, so those of bf16 shards are bf16).
        foreach_tensors: Made at each step on an accelerator, for all parameters at once.
        largest_tensors: Made at each step in host memory, for one parameter at a time.
    """

    name: str
    tensors: int
    foreach_tensors: int
    largest_tensors: int


OPTIMIZERS: Final[Mapping[str, OptimizerStates]] = MappingProxyType(
    {
        each.name: each
        for each in (
            OptimizerStates(name="adamw", tensors=2, foreach_tensors=1, largest_tensors=2),
            OptimizerStates(name="adam", tensors=2, foreach_tensors=1, largest_tensors=2),
            OptimizerStates(name="adamw-fused", tensors=2, foreach_tensors=0, largest_tensors=0),
            OptimizerStates(name="sgd", tensors=0, foreach_tensors=0, largest_tensors=0),
            OptimizerStates(name="sgd-momentum", tensors=1, foreach_tensors=0, largest_tensors=0),
            OptimizerStates(name="none", tensors=0, foreach_tensors=0, largest_tensors=0),
        )
    }
)
"""By name.

Source: torch 2.13, `torch/optim/adam.py`: `Adam._init_group` makes `exp_avg` and `exp_avg_sq` with `zeros_like(p)`, and a step count of one
float32 that is not counted here; `_multi_tensor_adam` takes the square roots of all second moments at once,
`_single_tensor_adam` those of one, and divides them into a new tensor; `_fused_adam` makes neither. AdamW is Adam with another
decay. `torch/optim/sgd.py`: `momentum_buffer` is a clone of the first gradient. `_default_to_fused_or_foreach` takes the
foreach way on accelerators, of DTensors too, and never on the CPU. `none` is a model that is only loaded: it has no gradients.
"""


def optimizer_named(name: str) -> OptimizerStates:
    """Return what an optimizer keeps.

    Raises:
        ConfigurationError: It is not known.
    """
    if name not in OPTIMIZERS:
        raise ConfigurationError(
            f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {name!r}."
            f"{did_you_mean(name, OPTIMIZERS, other_words={})}"
        )
    return OPTIMIZERS[name]
