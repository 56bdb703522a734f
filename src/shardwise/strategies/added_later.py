"""A parameter that comes into a model after its wrap belongs to one rank: nothing makes it, or its gradient, equal on the others.

An adapter of PEFT is such a case: each rank trains one of its own, every loss looks right, and a save keeps the first rank's. The
model tells nobody of a new parameter, so each optimizer's first step after a wrap looks for it, and `wrap_optimizer` does.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardwise.errors import OptimizerError, listed
from shardwise.materialization import clean_fqn, trained_parameters_of
from shardwise.strategies.first_step import check_first_steps, parameters_held

_plain_at_the_wrap: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()


def watch_for_parameters_added_to(model: nn.Module) -> None:
    """Refuse the steps of optimizers that hold parameters which come into a model from now on.

    Args:
        model: Just wrapped, over several ranks. What is not sharded in it now, the user has left out on purpose.
    """
    _plain_at_the_wrap[model] = {id(p) for p in model.parameters() if not isinstance(p, DTensor)}
    check_first_steps(refuse_added_later)


def refuse_added_later(optimizer: Optimizer) -> None:
    """Raise if an optimizer holds parameters that came into a wrapped model later.

    Raises:
        OptimizerError: It does.
    """
    held = {id(p) for p in parameters_held(optimizer) if not isinstance(p, DTensor)}
    for model, known in _plain_at_the_wrap.items() if held else ():
        added = held & trained_parameters_of(model) - known
        if added:
            names = [clean_fqn(fqn) for fqn, p in model.named_parameters() if id(p) in added]
            raise OptimizerError(
                f"{type(optimizer).__name__}: expected parameters that were in the model when it was wrapped, got {listed(names)}, "
                "which came later: each rank would train one of its own. Add adapters and heads before wrap_model; a "
                "parameter that is to stay whole on every rank belongs into fsdp_config['ignored_params']."
            )
