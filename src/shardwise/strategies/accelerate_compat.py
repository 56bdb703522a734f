"""What shardwise needs of Accelerate beyond its public methods; checked on accelerate 1.15.

Accelerate turns FSDP on only for accelerator ranks; CPU ranks would each train a whole replica under DDP. Setting the
state's two fields makes `backward`, `clip_grad_norm_`, `accumulate` and `save_state` take their FSDP2 path on any
device. `prepare` rebinds optimizers by data pointer, which is 0 for every empty shard and meta tensor, so groups come
out wrong; a model that is sharded already is therefore entered into the Accelerator's list directly.

`tests/distributed/test_accelerate.py` fails when a release shards CPU ranks itself: then this file can go.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import OffloadPolicy

from shardwise.errors import ConfigurationError, MissingDependencyError
from shardwise.strategies.accelerate_plugin import plugin_class
from shardwise.strategies.fsdp_config import FSDPConfig
from shardwise.strategies.precision import policy_of

OLDEST, NEWEST_CHECKED = (1, 15), (1, 15)
# What `save_state` and `backward` read of the plugin that all Accelerators of a process share.
_SHARED_OPTIONS = (
    "fsdp_version",
    "reshard_after_forward",
    "activation_checkpointing",
    "state_dict_type",
    "mixed_precision_policy",
)
_FSDP_FLAG = "ACCELERATE_USE_FSDP"
_EFFICIENT_FLAG = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def require_supported() -> None:
    """Raise unless an Accelerate that this file knows is installed; warn if it is newer than the checked one.

    Raises:
        MissingDependencyError: Naming the extra.
        ConfigurationError: It is too old.
    """
    try:
        version = importlib.metadata.version("accelerate")
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependencyError(
            "AccelerateStrategy needs accelerate. Install it with: pip install 'shardwise[accelerate]'"
        ) from None
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < OLDEST:
        raise ConfigurationError(
            f"AccelerateStrategy: expected accelerate {OLDEST[0]}.{OLDEST[1]} or newer, got {version}. Upgrade it with: "
            "pip install -U 'shardwise[accelerate]'"
        )
    if found > NEWEST_CHECKED:
        warnings.warn(
            f"AccelerateStrategy is checked on accelerate {NEWEST_CHECKED[0]}.{NEWEST_CHECKED[1]}; {version} is installed",
            stacklevel=4,
        )


def keep_gradient_state() -> Any | None:
    """Return the accumulation settings of an Accelerator that this process has already, for the next one to keep.

    Accelerators share them; a new one without the argument would set the old one's steps back to 1.
    """
    from accelerate.state import GradientState
    from accelerate.utils import GradientAccumulationPlugin

    if not GradientState._shared_state:
        return None
    return GradientAccumulationPlugin(**GradientState().plugin_kwargs)


def make_plugin(config: FSDPConfig, *, mixed_precision: str) -> Any:
    """Return Accelerate's FSDP2 plugin with every option given, so that none is read from the environment."""
    transformer = config.auto_wrap_policy == "transformer"
    names = [c if isinstance(c, str) else c.__name__ for c in config.wrap_classes or ()]
    return plugin_class()(
        fsdp_version=2,
        reshard_after_forward=config.reshard is not False,
        cpu_offload=config.offload_policy,
        auto_wrap_policy="transformer_based_wrap" if transformer else "no_wrap",
        transformer_cls_names_to_wrap=names or None,
        activation_checkpointing=config.activation_checkpointing,
        # False also where the efficient path is on: shardwise fills the shards, Accelerate must not do it again.
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
        mixed_precision_policy=policy_of("bf16" if mixed_precision == "fp8" else mixed_precision),
    )


def plugin_of(accelerator: Any) -> Any | None:
    """Return the FSDP plugin that an Accelerator was built with, or None.

    On CPU ranks Accelerate drops the plugin that it was given; there it is read again from the environment, which is
    what a launch YAML becomes.

    Raises:
        ConfigurationError: The plugin was an object, and is lost.
    """
    from accelerate import FullyShardedDataParallelPlugin

    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None and os.environ.get(_FSDP_FLAG, "false").lower() == "true":
        if not any(name in os.environ for name in ("FSDP_VERSION", "FSDP_AUTO_WRAP_POLICY")):
            raise ConfigurationError(
                "AccelerateStrategy: Accelerate drops a plugin object on CPU ranks, and the environment has no FSDP_VERSION "
                "to read its options from. Build the Accelerator from a launch YAML, or without a plugin and pass "
                "fsdp_config=."
            )
        plugin = FullyShardedDataParallelPlugin()
    return plugin


def config_of(plugin: Any) -> FSDPConfig:
    """Return the options of an adopted plugin in shardwise's words.

    Raises:
        ConfigurationError: The plugin is for FSDP1, or has an option that has no counterpart.
    """
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

    if plugin.fsdp_version != 2:
        raise ConfigurationError(
            "AccelerateStrategy: expected an Accelerator with fsdp_version: 2, got 1. Set it in the launch YAML, or pass "
            "FullyShardedDataParallelPlugin(fsdp_version=2) on an accelerator."
        )
    if plugin.ignored_modules is not None:
        raise ConfigurationError(
            "AccelerateStrategy: ignored_modules of the adopted Accelerator has no counterpart. Leave it out and name "
            "parameters in fsdp_config['ignored_params'] of a strategy without accelerator=."
        )
    policy = plugin.auto_wrap_policy
    function = policy.func if isinstance(policy, functools.partial) else policy
    wrap: Any = "none"
    if function is transformer_auto_wrap_policy:
        wrap = "transformer"
    elif function is size_based_auto_wrap_policy:
        wrap = _at_least(plugin.min_num_params)
    offload = plugin.cpu_offload
    classes = plugin.transformer_cls_names_to_wrap if wrap == "transformer" else None
    return FSDPConfig(
        reshard_after_forward=plugin.reshard_after_forward,
        cpu_offload=offload if isinstance(offload, OffloadPolicy) else bool(offload),
        activation_checkpointing=bool(plugin.activation_checkpointing),
        auto_wrap_policy=wrap,
        wrap_classes=tuple(classes) if classes else None,
        cpu_ram_efficient_loading=plugin.cpu_ram_efficient_loading if _efficient_was_chosen(plugin) else None,
    )


def _efficient_was_chosen(plugin: Any) -> bool:
    # The plugin says False both for "off" and for "not said"; it writes the flag only where it was given a value.
    return bool(plugin.cpu_ram_efficient_loading) or _EFFICIENT_FLAG in os.environ


def _at_least(min_num_params: int) -> Any:
    def is_large(module: nn.Module) -> bool:
        return sum(parameter.numel() for parameter in module.parameters()) > min_num_params

    return is_large


def enable_fsdp2(accelerator: Any, plugin: Any) -> None:
    """Make an Accelerator take its FSDP2 path on this device.

    Raises:
        ConfigurationError: Another Accelerator of this process has other options, which the two would share.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    state = accelerator.state
    if accelerator.mixed_precision != "no" and plugin.mixed_precision_policy is None:
        plugin.set_mixed_precision(accelerator.mixed_precision)
    earlier = getattr(state, "fsdp_plugin", None)
    if earlier is None:
        state.fsdp_plugin = plugin
    elif earlier is not plugin:
        for option in _SHARED_OPTIONS:
            ours, theirs = getattr(plugin, option), getattr(earlier, option)
            if ours != theirs:
                raise ConfigurationError(
                    f"AccelerateStrategy: {option} is {ours}, and {theirs} in the Accelerator that this process has already. "
                    "Accelerate keeps one set of options per process: use the same ones for both strategies, or "
                    "NativeFSDPStrategy for one of them."
                )
    state.distributed_type = DistributedType.FSDP
    # Each `AcceleratorState()` that Accelerate makes later, for an optimizer for instance, copies this over the former.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def register_model(accelerator: Any, model: nn.Module) -> None:
    """Enter a sharded model into an Accelerator, so that saving and clipping find it."""
    if not any(known is model for known in accelerator._models):
        accelerator._models.append(model)
    model._is_accelerate_prepared = True  # type: ignore[assignment]


@contextmanager
def forgotten_if_it_fails(accelerator: Any) -> Iterator[None]:
    """Take out of an Accelerator what the body has entered into it, if the body fails: the next wrap would find it there."""
    lists = [getattr(accelerator, name) for name in ("_models", "_optimizers", "_schedulers", "_dataloaders")]
    lengths = [len(entered) for entered in lists]
    try:
        yield
    except BaseException:
        for entered, length in zip(lists, lengths, strict=True):
            del entered[length:]
        raise


def refuse_second_model(accelerator: Any, model: nn.Module) -> None:
    """Raise if an Accelerator holds another model: its `clip_grad_norm_` and `save_state` would mix the two up.

    Raises:
        ConfigurationError: Naming the first model.
    """
    others = [type(known).__name__ for known in accelerator._models if known is not model]
    if others:
        raise ConfigurationError(
            f"wrap_model: one Accelerator holds one FSDP2 model, and this one holds {others[0]} already. Make another "
            "AccelerateStrategy for the second model, or call accelerator.free_memory() if the first is done with."
        )


def warn_of_optimizers(accelerator: Any) -> None:
    """Warn that `save_state` fails where there is not exactly one optimizer per model."""
    if len(accelerator._optimizers) > 1:
        warnings.warn(
            f"AccelerateStrategy: {len(accelerator._optimizers)} optimizers on one model train as usual, but Accelerate's "
            "save_state pairs optimizers with models by position and fails. Save with torch.distributed.checkpoint.",
            stacklevel=3,
        )


def shards_itself(accelerator: Any, config: FSDPConfig, *, mesh_shape: tuple[int, ...]) -> bool:
    """Return whether stock Accelerate shards on this device in the way that the options ask for.

    It turns FSDP on for accelerators only, over one axis of all ranks, and its plugin has no place for some options.
    """
    return bool(
        accelerator.device.type != "cpu"
        and mesh_shape == (accelerator.num_processes,)
        and not config.ignored_params
        and config.shard_placement_fn is None
        and not callable(config.auto_wrap_policy)
        and (config.reshard is None or isinstance(config.reshard, bool))
    )
