"""An optimizer whose parameters are not those that gradients come to would train nothing, and each loss would look right.

So it is with one that was made before the wrap and not passed to it: what a wrap takes out of a model carries a mark. And with one that
was made after a forward, on what FSDP2 leaves in the place of shards until a backward. And with a model that is still on meta because
nobody wrapped it. Each optimizer's first step after a load or a wrap looks for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer

from shardwise.errors import OptimizerError
from shardwise.materialization import parameters_of, resting_collector, stand_ins_among
from shardwise.strategies.first_step import check_first_steps, parameters_held

_MARK = "_shardwise_replaced"
_AWAITS = "_shardwise_awaits_wrap"
_wrapped: WeakSet[nn.Module] = WeakSet()


@contextmanager
def replaced_parameters_marked(model: nn.Module) -> Iterator[None]:
    """Mark the parameters of a model that are not in it any more when the body ends."""
    with resting_collector():
        for parameter in parameters_of(model):
            parameter.__dict__.pop(_AWAITS, None)
            setattr(parameter, _MARK, True)
    try:
        yield
    finally:
        with resting_collector():
            for parameter in parameters_of(model):
                parameter.__dict__.pop(_MARK, None)
        check_first_steps(_refuse_forgotten)
    _wrapped.add(model)
    check_first_steps(_refuse_stand_ins)


def note_unwrapped(model: nn.Module) -> None:
    """Have the first step of an optimizer on a model refused as long as the model is on meta."""
    with resting_collector():
        for parameter in parameters_of(model):
            setattr(parameter, _AWAITS, True)
    check_first_steps(_refuse_unwrapped)


def _refuse_unwrapped(optimizer: Optimizer) -> None:
    held = parameters_held(optimizer)
    waiting = [parameter for parameter in held if parameter.is_meta and hasattr(parameter, _AWAITS)]
    if waiting:
        raise OptimizerError(
            f"{type(optimizer).__name__}.step: expected parameters with values, got {len(waiting)} of {len(held)} on meta, the first of "
            f"shape {tuple(waiting[0].shape)}: load_pretrained(defer=True) leaves the values in the files until wrap_model(model, "
            "optimizer) is called, which comes before the first forward."
        )


def _refuse_forgotten(optimizer: Optimizer) -> None:
    replaced = [p for p in parameters_held(optimizer) if hasattr(p, _MARK)]
    # With a gradient it is in use: another model shares it.
    if replaced and all(parameter.grad is None for parameter in replaced):
        raise OptimizerError(
            f"{type(optimizer).__name__}.step: expected parameters of the wrapped model, got {len(replaced)} that wrap_model took "
            f"out of it, the first of shape {tuple(replaced[0].shape)}: an optimizer that was made before the wrap and not "
            "passed to it trains nothing. Use wrap_model(model, optimizer), or make it on model.parameters() after the wrap."
        )


def _refuse_stand_ins(optimizer: Optimizer) -> None:
    held = parameters_held(optimizer)
    for model in _wrapped:
        stand_ins = stand_ins_among(held, model)
        if stand_ins:
            raise OptimizerError(
                f"{type(optimizer).__name__}.step: expected the shards of the wrapped model, got {len(stand_ins)} parameters that "
                f"stand for shards from a forward to its backward, the first of shape {tuple(stand_ins[0].shape)}: they are not "
                "trained. Make the optimizer before the first forward, or after a backward; or call reshard() on the model's FSDP "
                "modules before."
            )
