"""Accelerate's FSDP2 plugin for a model that is sharded already, which `Accelerator.prepare` must leave alone.

Trainers make an Accelerator of their own and prepare the model with it. `fsdp2_prepare_model` returns an `FSDPModule` as it is, but
before that `_prepare_fsdp2` looks for the layers by the names of their classes, which `fully_shard` has changed, and checkpoints
their activations once more; and after it, it finds the optimizer's parameters again by the addresses of their shards. All of this
goes through the plugin, which Accelerators of one process share.

Source: `Accelerator._prepare_fsdp2`, accelerate 1.15. `tests/distributed/test_trainers.py` fails when this does not do any more.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from shardwise.errors import ConfigurationError


@functools.cache
def plugin_class() -> Any:
    """Return the class, made when accelerate is first needed."""
    from accelerate import FullyShardedDataParallelPlugin

    class PluginOfShardedModels(FullyShardedDataParallelPlugin):  # type: ignore[misc]
        def set_auto_wrap_policy(self, model: nn.Module) -> None:
            """Do nothing about a model that is sharded, and has its activations checkpointed if that was asked for."""
            if not isinstance(getattr(model, "_orig_mod", model), FSDPModule):
                super().set_auto_wrap_policy(model)
                return
            _refuse_empty_shards(model)
            self.activation_checkpointing = False

    return PluginOfShardedModels


def _refuse_empty_shards(model: nn.Module) -> None:
    """Raise where an optimizer's parameters cannot be told apart by address: those of all empty shards are the same."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and _has_empty_shards(p)]
    if len(named) > 1:
        raise ConfigurationError(
            f"Accelerator.prepare: expected a trainable row for every rank in all parameters but one, got {named[0][0]} of shape "
            f"{tuple(named[0][1].shape)} and {len(named) - 1} more: Accelerate would mix them up in the optimizer. Pass the "
            "optimizer to strategy.wrap_model or strategy.wrap_optimizer and drive the step yourself, or use fewer ranks."
        )


def _has_empty_shards(parameter: nn.Parameter) -> bool:
    if not isinstance(parameter, DTensor):
        return False
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            ranks, length = parameter.device_mesh.size(axis), parameter.shape[placement.dim]
            if -(-length // ranks) * (ranks - 1) >= length:
                return True
    return False
