"""An optimizer that was made before the wrap and not passed to it holds parameters that no forward uses: it would train nothing.

torch keeps no list of optimizers, but calls a hook at each one's step. What a wrap takes out of a model carries a mark, and
each optimizer's first step after a wrap looks for it.

Source: `torch.optim.optimizer.register_optimizer_step_pre_hook`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from shardwise.errors import OptimizerError
from shardwise.materialization import parameters_of

_MARK = "_shardwise_replaced"
_looked_at: WeakSet[Optimizer] = WeakSet()


@contextmanager
def replaced_parameters_marked(model: nn.Module) -> Iterator[None]:
    """Mark the parameters of a model that are not in it any more when the body ends."""
    for parameter in parameters_of(model):
        setattr(parameter, _MARK, True)
    try:
        yield
    finally:
        for parameter in parameters_of(model):
            parameter.__dict__.pop(_MARK, None)
        _looked_at.clear()
        _watch()


@functools.cache
def _watch() -> None:
    register_optimizer_step_pre_hook(_refuse_forgotten)


def _refuse_forgotten(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or optimizer in _looked_at:
        return
    replaced = [p for group in optimizer.param_groups for p in group["params"] if hasattr(p, _MARK)]
    # With a gradient it is in use: another model shares it.
    if replaced and all(parameter.grad is None for parameter in replaced):
        raise OptimizerError(
            f"{type(optimizer).__name__}.step: expected parameters of the wrapped model, got {len(replaced)} that wrap_model took "
            f"out of it, the first of shape {tuple(replaced[0].shape)}: an optimizer that was made before the wrap and not "
            "passed to it trains nothing. Use wrap_model(model, optimizer), or make it on model.parameters() after the wrap."
        )
    _looked_at.add(optimizer)
