"""Checks at each optimizer's first step after a wrap: torch keeps no list of optimizers, but calls a hook at each one's step.

Source: `torch.optim.optimizer.register_optimizer_step_pre_hook`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_checks: dict[Callable[[Optimizer], None], None] = {}  # in order, each once
_looked_at: WeakSet[Optimizer] = WeakSet()


def check_first_steps(check: Callable[[Optimizer], None]) -> None:
    """Have every optimizer checked at its next step, and then no more until this is called again.

    Args:
        check: A module-level function; it raises what the step is to raise.
    """
    _checks[check] = None
    _looked_at.clear()
    _watch()


def parameters_held(optimizer: Optimizer) -> list[torch.Tensor]:
    """Return the parameters of all groups of an optimizer, in their order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@functools.cache
def _watch() -> None:
    register_optimizer_step_pre_hook(_look)


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or optimizer in _looked_at:
        return
    for check in _checks:
        check(optimizer)
    _looked_at.add(optimizer)
