"""Whose code makes the values of a module's tensors: PEFT's, transformers', or the module's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from shardwise.materialization.peft_rule import peft_rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Code that makes values of a module's tensors.

    Args:
        owner: Fqn of the module whose code it is, or of the part of it whose values it makes; its random numbers start from
            there.
        calls: One after the other: a later one may overwrite what an earlier one wrote.
    """

    owner: str
    calls: Sequence[Callable[[], None]]


def initialising_rules(model: nn.Module, fqn: str, names: Sequence[str]) -> list[Rule]:
    """Return the rules by which a module's parameters may get the values that they start with.

    The innermost owner decides. A PEFT layer alone knows how its adapters start. In a transformers model `_init_weights` is
    called on a module and then on those around it, as its `init_weights` does: GPT-2 scales a projection by the block around
    it. Otherwise it is `reset_parameters`, of the module or else of the nearest one around it that has such a method:
    containers like `nn.ParameterList` leave it to their owner.

    Args:
        model: That the module is a part of.
        fqn: Of the module; empty for the model itself.
        names: Of the parameters that are wanted, in the module.

    Returns:
        Rules in the order of preference: a later one is for what the earlier ones did not write.

    Raises:
        ConfigurationError: PEFT starts a parameter from values that are not there yet.
    """
    around = _outwards(model, fqn)
    of_peft = peft_rule(around, fqn, names)
    if of_peft is not None:
        return [Rule(owner=each.owner, calls=each.calls) for each in of_peft]
    init_weights = _init_weights_calls(around)
    resets = [method for each in around if (method := _method(each, "reset_parameters")) is not None]
    choices = [*([init_weights] if init_weights else []), *([method] for method in resets)]
    return [Rule(owner=fqn, calls=calls) for calls in choices]


def buffer_rules(model: nn.Module, fqn: str) -> list[Rule]:
    """Return the rules by which a module may make its buffers again.

    Args:
        model: That the module is a part of.
        fqn: Of the module; empty for the model itself.

    Returns:
        In the order of preference: `_init_weights` of the transformers model around it, its `reset_buffers`, the
        `reset_running_stats` of torch's norms, its `reset_parameters` if it has no parameters: otherwise it would make those;
        `_init_weights` on the modules around it, one by one: Falcon-H1's model makes a buffer of each of its layers; and what
        a rotary embedding of transformers 4.57 calls in its constructor alone.
    """
    around = _outwards(model, fqn)
    module = around[0]
    calls = _init_weights_calls(around)
    choices = [calls[:1]] if calls else []
    names = ["reset_buffers", "reset_running_stats"]
    if not any(True for _ in module.parameters(recurse=False)):
        names.append("reset_parameters")
    methods = (_method(module, name) for name in names)
    choices += [[method] for method in methods if method is not None]
    choices += [[call] for call in calls[1:]]
    if _method(module, "rope_init_fn") is not None and hasattr(module, "config"):
        choices.append([partial(_rotary_again, module)])
    return [Rule(owner=fqn, calls=calls) for calls in choices]


def _rotary_again(module: Any) -> None:
    # The scaling beside it is a number, which the constructor has computed on meta too.
    inverse, _ = module.rope_init_fn(module.config, None)
    module.inv_freq.copy_(inverse)


def _outwards(model: nn.Module, fqn: str) -> list[nn.Module]:
    """Return a module and those around it, the model last."""
    parts = fqn.split(".") if fqn else []
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1)]


def _init_weights_calls(around: Sequence[nn.Module]) -> list[Callable[[], None]]:
    """Return `_init_weights` of the nearest model around each module that has one, on that module."""
    calls: list[Callable[[], None]] = []
    waiting: list[nn.Module] = []
    for each in around:
        waiting.append(each)
        if _initialises_others(each):
            init_weights: Any = each._init_weights
            calls += [partial(init_weights, inner) for inner in waiting]
            waiting = []
    return calls


def _initialises_others(module: nn.Module) -> bool:
    # On the class: PEFT's model forwards attributes to the one inside.
    method = getattr(type(module), "_init_weights", None)
    if not callable(method):
        return False
    try:
        inspect.signature(method).bind(module, module)
    except (TypeError, ValueError):  # a method of that name that initialises its own module
        return False
    return True


def _method(module: nn.Module, name: str) -> Callable[[], None] | None:
    method: Callable[[], None] | None = getattr(module, name, None)
    return method if callable(method) else None
