"""Which tensors of a PEFT model are those of the model inside of it, and under which names a checkpoint of that has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from shardwise.errors import ConfigurationError
from shardwise.materialization.names import checkpoint_name_of, clean_fqn


def base_names(model: Any) -> Callable[[str], str | None]:
    """Return what says of a fqn in a PEFT model which name it has in the base model; None of what the adapters have added.

    Of a module that has a trainable copy (`modules_to_save`) the active adapter's copy counts.

    Raises:
        ConfigurationError: A module is changed in a way that is not known here.
    """
    added = tuple(_added(model))
    return lambda fqn: None if fqn.startswith(added) else checkpoint_name_of(fqn)


def _added(model: Any) -> Iterator[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    for name, module in model.named_modules():
        prefix = clean_fqn(f"{name}.")
        if isinstance(module, ModulesToSaveWrapper):
            active = module.active_adapters[:1]
            if active:
                yield f"{prefix}original_module."
            yield from (
                f"{prefix}modules_to_save.{each}." for each in module.modules_to_save if each not in active
            )
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise ConfigurationError(
                f"{prefix[:-1]}: expected LoRA and modules_to_save to merge on shards, got {type(module).__name__}. Export the adapter "
                "alone (adapters='alone'), and merge it with PEFT's merge_and_unload in one process."
            )
        elif isinstance(module, BaseTunerLayer):
            yield from (f"{prefix}{each}." for each in module.adapter_layer_names)
