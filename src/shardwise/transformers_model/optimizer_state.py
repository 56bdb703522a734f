"""What an optimizer will keep of a parameter, found without changing either."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer


def new_state(optimizer: Optimizer, parameter: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state that an optimizer makes for one parameter in its first step.

    It steps, by a gradient and a learning rate of zero, with that parameter alone. All ranks of a shard call this together.

    Args:
        optimizer: Of torch; its state and groups are afterwards as before.
        parameter: Trainable; likewise.
        group: Options of the parameter's group.

    Returns:
        Tensors, which are shards where the parameter is one, and other values, by the optimizer's keys.
    """
    before = optimizer.state, optimizer.param_groups, parameter.grad
    rate = group.get("lr")
    still = {} if rate is None else {"lr": torch.zeros_like(rate) if isinstance(rate, torch.Tensor) else 0.0}
    optimizer.state = defaultdict(dict)
    optimizer.param_groups = [{**group, **still, "params": [parameter]}]
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
        return dict(optimizer.state[parameter])
    finally:
        optimizer.state, optimizer.param_groups, parameter.grad = before
