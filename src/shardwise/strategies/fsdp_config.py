"""The options of `fsdp_config`, checked once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from shardwise.errors import ConfigurationError, did_you_mean

_STRATEGIES = {
    "FULL_SHARD": True,
    "HYBRID_SHARD": True,
    "SHARD_GRAD_OP": False,
    "HYBRID_SHARD_ZERO2": False,
}


# Accelerate's words, without its prefix `fsdp_`.
_OTHER_WORDS = {
    "offload_params": "cpu_offload",
    "transformer_cls_names_to_wrap": "wrap_classes",
    "transformer_layer_cls_to_wrap": "wrap_classes",
}


def _meant(key: str, known: Iterable[str]) -> str:
    meant = did_you_mean(key.removeprefix("fsdp_"), known, other_words=_OTHER_WORDS)
    return meant.replace("?", f" by {key!r}?")


def _is_class_or_name(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, type) and issubclass(value, nn.Module))


# What each option's value must be; those without an entry are checked by their meaning.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "reshard_after_forward": (lambda v: v is None or isinstance(v, int), "a bool, a number of ranks or None"),
    "cpu_offload": (lambda v: isinstance(v, (bool, OffloadPolicy)), "a bool or an offload policy of torch"),
    "activation_checkpointing": (lambda v: isinstance(v, bool), "a bool"),
    "auto_wrap_policy": (
        lambda v: callable(v) or v in ("transformer", "none"),
        "'transformer', 'none' or a function",
    ),
    "wrap_classes": (
        lambda v: v is None or (isinstance(v, tuple) and len(v) > 0 and all(map(_is_class_or_name, v))),
        "names or classes of modules",
    ),
    "shard_placement_fn": (lambda v: v is None or callable(v), "a function"),
    "ignored_params": (
        lambda v: isinstance(v, tuple) and all(isinstance(name, str) for name in v),
        "names of parameters",
    ),
    "cpu_ram_efficient_loading": (lambda v: v is None or isinstance(v, bool), "a bool"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FSDPConfig:
    """Options of FSDP2 as shardwise applies them; the fields are the keys of the `fsdp_config` dict.

    Args:
        reshard_after_forward: Free gathered parameters after each unit's forward; None is FSDP2's own choice
            (all units but the root), an int reshards to that many ranks, of shards on dim 0 only.
        cpu_offload: Keep shards in host memory; True, or an offload policy of torch.
        activation_checkpointing: Recompute the activations of each wrapped layer in backward.
        auto_wrap_policy: `"transformer"` (wrap classes, the default), `"none"` (the root alone), or a function that
            says for a module whether it becomes a unit.
        wrap_classes: Class names or classes of the layers that become units. Default: the model's
            `_no_split_modules`, else the entries of its module lists.
        shard_placement_fn: As in `fully_shard`: the placement of one parameter, or None for dim 0. Left out: dim 0, but for a
            stack of matrices that dim 0 would pad to 1.25 times its size or more the first dim that the ranks divide.
        ignored_params: Names of parameters that stay whole on every rank; their gradients are not synchronised.
        sharding_strategy: FSDP1's word for `reshard_after_forward`: FULL_SHARD, SHARD_GRAD_OP, HYBRID_SHARD.
        backward_prefetch: FSDP1's option. FSDP2 always prefetches like BACKWARD_PRE, the only value accepted.
        cpu_ram_efficient_loading: Accelerate's word for the strategy's `memory_efficient_init`.
    """

    reshard_after_forward: bool | int | None = None
    cpu_offload: bool | OffloadPolicy = False
    activation_checkpointing: bool = False
    auto_wrap_policy: str | Callable[[nn.Module], bool] = "transformer"
    wrap_classes: tuple[str | type[nn.Module], ...] | None = None
    shard_placement_fn: Callable[[nn.Parameter], Any] | None = None
    ignored_params: tuple[str, ...] = ()
    sharding_strategy: str | None = None
    backward_prefetch: str | None = None
    cpu_ram_efficient_loading: bool | None = None

    def __post_init__(self) -> None:
        for name, (is_valid, expected) in _VALUES.items():
            if not is_valid(getattr(self, name)):
                raise ConfigurationError(
                    f"fsdp_config[{name!r}]: expected {expected}, got {getattr(self, name)!r}"
                )
        if self.wrap_classes is not None and self.auto_wrap_policy != "transformer":
            raise ConfigurationError(
                "fsdp_config: wrap_classes are the layers of auto_wrap_policy='transformer', got "
                f"auto_wrap_policy={self.auto_wrap_policy!r} as well. Give one of the two."
            )
        if self.sharding_strategy is not None:
            is_name = isinstance(self.sharding_strategy, str)
            implied = _STRATEGIES.get(self.sharding_strategy) if is_name else None
            if implied is None:
                raise ConfigurationError(
                    f"fsdp_config['sharding_strategy']: expected one of {', '.join(_STRATEGIES)}, got "
                    f"{self.sharding_strategy!r}. Without sharding, use DistributedDataParallel instead."
                )
            if self.reshard_after_forward not in (None, implied):
                raise ConfigurationError(
                    f"fsdp_config: sharding_strategy={self.sharding_strategy!r} means reshard_after_forward={implied}, "
                    f"got {self.reshard_after_forward}. Give one of the two."
                )
        if self.backward_prefetch not in (None, "BACKWARD_PRE"):
            raise ConfigurationError(
                f"fsdp_config['backward_prefetch']: FSDP2 knows only BACKWARD_PRE, got {self.backward_prefetch!r}. Leave it out."
            )

    @classmethod
    def from_dict(cls, options: Mapping[str, Any] | None) -> FSDPConfig:
        """Check the options of a caller and return them frozen; the caller's mapping stays as it is.

        Raises:
            ConfigurationError: An unknown key, with the list of known ones, or a value that does not fit.
        """
        if not isinstance(options, Mapping | None):
            raise ConfigurationError(f"fsdp_config: expected a dict of options or None, got {options!r}")
        options = dict(options or {})
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in options if key not in known)
        if unknown:
            raise ConfigurationError(
                f"fsdp_config: unknown keys {', '.join(unknown)}. Known keys: {', '.join(known)}."
                f"{''.join(_meant(key, known) for key in unknown)}"
            )
        for name in ("wrap_classes", "ignored_params"):
            value = options.get(name)
            if isinstance(value, (str, type)):
                options[name] = (value,)
            elif isinstance(value, Iterable):
                options[name] = tuple(value)
        return cls(**options)

    @property
    def reshard(self) -> bool | int | None:
        """`reshard_after_forward`, with `sharding_strategy` taken into account."""
        if self.sharding_strategy is not None:
            return _STRATEGIES[self.sharding_strategy]
        return self.reshard_after_forward

    @property
    def offload_policy(self) -> OffloadPolicy:
        """The policy object that `fully_shard` takes; host memory is pinned only where there is a device to pin it for."""
        if isinstance(self.cpu_offload, OffloadPolicy):
            policy = self.cpu_offload
        else:
            policy = CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy()
        if isinstance(policy, CPUOffloadPolicy) and not torch.accelerator.is_available():
            return CPUOffloadPolicy(pin_memory=False)
        return policy


def efficient_switch(memory_efficient_init: bool | None, config: FSDPConfig) -> bool:
    """Return whether the efficient path is on, from its two names.

    Args:
        memory_efficient_init: The strategy's argument; None where the caller left it out.
        config: Holds `cpu_ram_efficient_loading`.

    Raises:
        ConfigurationError: Both are given and differ.
    """
    other = config.cpu_ram_efficient_loading
    if memory_efficient_init is None:
        return True if other is None else other
    if other is not None and other != memory_efficient_init:
        raise ConfigurationError(
            f"memory_efficient_init={memory_efficient_init} and fsdp_config['cpu_ram_efficient_loading']={other} are "
            "the same switch. Give one of the two."
        )
    return memory_efficient_init
