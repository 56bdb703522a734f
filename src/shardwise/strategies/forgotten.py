"""An optimizer that was made before the wrap and not passed to it holds parameters that no forward uses: it would train nothing.

What a wrap takes out of a model carries a mark, and each optimizer's first step after a wrap looks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer

from shardwise.errors import OptimizerError
from shardwise.materialization import parameters_of
from shardwise.strategies.first_step import check_first_steps

_MARK = "_shardwise_replaced"


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
        check_first_steps(_refuse_forgotten)


def _refuse_forgotten(optimizer: Optimizer) -> None:
    replaced = [p for group in optimizer.param_groups for p in group["params"] if hasattr(p, _MARK)]
    # With a gradient it is in use: another model shares it.
    if replaced and all(parameter.grad is None for parameter in replaced):
        raise OptimizerError(
            f"{type(optimizer).__name__}.step: expected parameters of the wrapped model, got {len(replaced)} that wrap_model took "
            f"out of it, the first of shape {tuple(replaced[0].shape)}: an optimizer that was made before the wrap and not "
            "passed to it trains nothing. Use wrap_model(model, optimizer), or make it on model.parameters() after the wrap."
        )
