"""Optimizers with decay groups, and schedulers, by class or by name."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from shardwise.errors import ConfigurationError, OptimizerError


def make_optimizer(
    model: nn.Module, optimizer_cls: str | Callable[..., Optimizer], arguments: Mapping[str, Any]
) -> Optimizer:
    """Make an optimizer on a model's trainable parameters; only what should decay does.

    Args:
        model: Wrapped or not.
        optimizer_cls: A class, a function that makes one from groups, or the name of a class in `torch.optim`.
        arguments: Of the class.

    Returns:
        The optimizer, of two groups where the class knows weight decay: with the class's or the given `weight_decay`, and
        with none.

    Raises:
        ConfigurationError: No optimizer has that name.
        OptimizerError: Nothing is trainable.
    """
    make = _named(optimizer_cls, torch.optim, Optimizer, what="optimizer_cls") or optimizer_cls
    if not callable(make):
        raise ConfigurationError(
            f"optimizer_cls: expected a class, a function, or the name of a class in torch.optim, got {optimizer_cls!r}"
        )
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise OptimizerError(
            f"set_optimizer: expected trainable parameters in {type(model).__name__}, got none. Unfreeze some, or add an adapter."
        )
    if not _takes_weight_decay(make):
        return make(list(trainable.values()), **arguments)
    decaying = decaying_names(model)
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trainable.items() if name in decaying]},
        {"params": [p for name, p in trainable.items() if name not in decaying], "weight_decay": 0.0},
    ]
    return make([group for group in groups if group["params"]], **arguments)


def decaying_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that weight decay is for: no biases, no norms, nothing of one dim.

    The first two are what `transformers.Trainer.get_decay_parameter_names` says; without accelerate that class cannot be
    imported, and the number of dims alone decides.
    """
    names = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    if importlib.util.find_spec("accelerate") is None:
        return frozenset(names)
    from transformers import Trainer

    # It looks at the model alone, not at the trainer, which needs a model with values to be made.
    return frozenset(names.intersection(Trainer.get_decay_parameter_names(None, model)))


def make_scheduler(
    optimizer: Optimizer, scheduler_cls: str | Callable[..., Any], arguments: Mapping[str, Any]
) -> Any:
    """Make a scheduler on a torch optimizer.

    Args:
        optimizer: Of torch, not a wrapper around it.
        scheduler_cls: A class or function, the name of a class in `torch.optim.lr_scheduler`, or one of the names that
            `transformers.get_scheduler` knows (`"linear"`, `"cosine"`, `"constant_with_warmup"`, and others).
        arguments: Of the class; of a transformers name `num_warmup_steps`, `num_training_steps` and
            `scheduler_specific_kwargs`.

    Raises:
        ConfigurationError: No scheduler has that name, or it steps by a metric.
    """
    made = _scheduler(optimizer, scheduler_cls, arguments)
    if isinstance(made, ReduceLROnPlateau):
        raise ConfigurationError(
            "set_lr_scheduler: ReduceLROnPlateau steps by a metric, which clip_grad_and_step does not have. Make it on "
            "model.optimizer and step it yourself."
        )
    return made


def _scheduler(optimizer: Optimizer, scheduler_cls: Any, arguments: Mapping[str, Any]) -> Any:
    if not isinstance(scheduler_cls, str):
        return scheduler_cls(optimizer, **arguments)
    from transformers import SchedulerType, get_scheduler

    known = [str(kind.value) for kind in SchedulerType]
    if scheduler_cls in known:
        return get_scheduler(scheduler_cls, optimizer, **arguments)
    make = _named(scheduler_cls, torch.optim.lr_scheduler, LRScheduler, what="scheduler_cls", known=known)
    return make(optimizer, **arguments)  # type: ignore[misc]


def _named(
    name: Any, module: Any, kind: Any, *, what: str, known: list[str] | None = None
) -> Callable[..., Any] | None:
    if not isinstance(name, str):
        return None
    classes = {key: v for key, v in vars(module).items() if isinstance(v, type) and issubclass(v, kind)}
    if name not in classes:
        listed = ", ".join([*(known or ()), *sorted(key for key in classes if not key.startswith("_"))])
        raise ConfigurationError(f"{what}: expected a class, or one of {listed}; got {name!r}")
    made: Callable[..., Any] = classes[name]
    return made


def _takes_weight_decay(make: Callable[..., Any]) -> bool:
    parameters = inspect.signature(make).parameters
    return "weight_decay" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
