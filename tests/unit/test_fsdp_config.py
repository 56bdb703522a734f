"""The options of `fsdp_config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, ShardingStrategy

from shardwise.errors import ConfigurationError
from shardwise.strategies.fsdp_config import FSDPConfig, efficient_switch


def message_of(options: dict[str, Any]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        FSDPConfig.from_dict(options)
    return str(caught.value)


def policy(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def placement(parameter: nn.Parameter) -> None:
    return None


# Option, value given, value kept.
ACCEPTED: list[tuple[str, Any, Any]] = [
    ("reshard_after_forward", True, True),
    ("reshard_after_forward", False, False),
    ("reshard_after_forward", 2, 2),
    ("cpu_offload", True, True),
    ("activation_checkpointing", True, True),
    ("auto_wrap_policy", "none", "none"),
    ("auto_wrap_policy", policy, policy),
    ("wrap_classes", "Layer", ("Layer",)),
    ("wrap_classes", nn.Linear, (nn.Linear,)),
    ("wrap_classes", ["Layer", nn.Linear], ("Layer", nn.Linear)),
    ("shard_placement_fn", placement, placement),
    ("ignored_params", "head.weight", ("head.weight",)),
    ("ignored_params", ["a", "b"], ("a", "b")),
    ("ignored_params", [], ()),
    ("sharding_strategy", "SHARD_GRAD_OP", "SHARD_GRAD_OP"),
    ("backward_prefetch", "BACKWARD_PRE", "BACKWARD_PRE"),
    ("cpu_ram_efficient_loading", False, False),
]


@pytest.mark.parametrize(("name", "given", "kept"), ACCEPTED)
def test_each_option_is_taken(name: str, given: Any, kept: Any) -> None:
    config = FSDPConfig.from_dict({name: given})
    assert getattr(config, name) == kept
    others = [field for field in dataclasses.fields(FSDPConfig) if field.name != name]
    assert all(getattr(config, field.name) == field.default for field in others)


def test_every_option_is_tested_above() -> None:
    assert {name for name, _, _ in ACCEPTED} == {field.name for field in dataclasses.fields(FSDPConfig)}


@pytest.mark.parametrize("options", [None, {}])
def test_no_options_are_the_defaults(options: dict[str, Any] | None) -> None:
    assert FSDPConfig.from_dict(options) == FSDPConfig()


def test_anything_but_a_mapping_is_refused() -> None:
    assert message_of(3) == "fsdp_config: expected a dict of options or None, got 3"  # type: ignore[arg-type]


def test_unknown_keys_are_listed_with_the_known_ones() -> None:
    assert message_of({"reshard": True, "cpu_offload": True, "Wrap": 1, 3: None}) == (  # type: ignore[dict-item]
        "fsdp_config: unknown keys 3, Wrap, reshard. Known keys: reshard_after_forward, cpu_offload, "
        "activation_checkpointing, auto_wrap_policy, wrap_classes, shard_placement_fn, ignored_params, "
        "sharding_strategy, backward_prefetch, cpu_ram_efficient_loading. Did you mean 'wrap_classes' by 'Wrap'? "
        "Did you mean 'reshard_after_forward' by 'reshard'?"
    )


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("wrap_class", "wrap_classes"),
        ("ignored_parameters", "ignored_params"),
        ("CPU_Offload", "cpu_offload"),
        ("fsdp_reshard_after_forward", "reshard_after_forward"),
        ("fsdp_transformer_layer_cls_to_wrap", "wrap_classes"),
        ("offload_params", "cpu_offload"),
    ],
)
def test_an_unknown_key_that_is_close_to_a_known_one(given: str, meant: str) -> None:
    assert message_of({given: True}).endswith(f" Did you mean {meant!r} by {given!r}?")


def test_an_unknown_key_that_is_close_to_none() -> None:
    assert message_of({"colour": "red"}).endswith("cpu_ram_efficient_loading.")


def test_the_callers_dict_and_lists_stay_as_they_are() -> None:
    classes = ["Layer"]
    options = {"wrap_classes": classes, "ignored_params": "head.weight"}
    config = FSDPConfig.from_dict(options)
    assert options == {"wrap_classes": ["Layer"], "ignored_params": "head.weight"}
    assert options["wrap_classes"] is classes
    classes.append("Other")
    assert config.wrap_classes == ("Layer",)


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FSDPConfig().cpu_offload = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("reshard_after_forward", "yes", "expected a bool, a number of ranks or None, got 'yes'"),
        ("cpu_offload", "cpu", "expected a bool or an offload policy of torch, got 'cpu'"),
        ("activation_checkpointing", 1, "expected a bool, got 1"),
        ("auto_wrap_policy", "size", "expected 'transformer', 'none' or a function, got 'size'"),
        ("auto_wrap_policy", None, "expected 'transformer', 'none' or a function, got None"),
        ("wrap_classes", 5, "expected names or classes of modules, got 5"),
        ("wrap_classes", [], "expected names or classes of modules, got ()"),
        ("wrap_classes", [dict], "expected names or classes of modules, got (<class 'dict'>,)"),
        ("shard_placement_fn", 0, "expected a function, got 0"),
        ("ignored_params", 5, "expected names of parameters, got 5"),
        ("ignored_params", [nn.Linear], "expected names of parameters, got (<class 'torch.nn"),
        ("sharding_strategy", "NO_SHARD", "expected one of FULL_SHARD, HYBRID_SHARD, SHARD_GRAD_OP, "),
        ("sharding_strategy", ["FULL_SHARD"], "got ['FULL_SHARD']"),
        ("sharding_strategy", ShardingStrategy.FULL_SHARD, "got <ShardingStrategy.FULL_SHARD"),
        (
            "backward_prefetch",
            "BACKWARD_POST",
            "FSDP2 knows only BACKWARD_PRE, got 'BACKWARD_POST'. Leave it",
        ),
        ("cpu_ram_efficient_loading", "true", "expected a bool, got 'true'"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(name: str, value: Any, expected: str) -> None:
    message = message_of({name: value})
    assert message.startswith(f"fsdp_config[{name!r}]: ")
    assert expected in message


def test_no_sharding_at_all_names_the_alternative() -> None:
    assert "Without sharding, use DistributedDataParallel" in message_of({"sharding_strategy": "NO_SHARD"})


@pytest.mark.parametrize("chosen", ["none", policy])
def test_wrap_classes_with_another_policy_are_refused(chosen: str | Callable[[nn.Module], bool]) -> None:
    message = message_of({"wrap_classes": ["Layer"], "auto_wrap_policy": chosen})
    assert "wrap_classes are the layers of auto_wrap_policy='transformer'" in message
    assert f"got auto_wrap_policy={chosen!r} as well. Give one of the two." in message


@pytest.mark.parametrize(
    ("strategy", "reshards"),
    [
        ("FULL_SHARD", True),
        ("HYBRID_SHARD", True),
        ("SHARD_GRAD_OP", False),
        ("HYBRID_SHARD_ZERO2", False),
    ],
)
def test_sharding_strategy_means_reshard_after_forward(strategy: str, reshards: bool) -> None:
    assert FSDPConfig.from_dict({"sharding_strategy": strategy}).reshard is reshards
    both = {"sharding_strategy": strategy, "reshard_after_forward": reshards}
    assert FSDPConfig.from_dict(both).reshard is reshards
    assert message_of({**both, "reshard_after_forward": not reshards}) == (
        f"fsdp_config: sharding_strategy={strategy!r} means reshard_after_forward={reshards}, got {not reshards}. "
        "Give one of the two."
    )


@pytest.mark.parametrize("value", [None, True, False, 4])
def test_reshard_is_reshard_after_forward_otherwise(value: bool | int | None) -> None:
    assert FSDPConfig(reshard_after_forward=value).reshard is value


@pytest.mark.parametrize("has_accelerator", [True, False])
def test_cpu_offload_becomes_a_policy(monkeypatch: pytest.MonkeyPatch, has_accelerator: bool) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_accelerator)
    assert type(FSDPConfig().offload_policy) is OffloadPolicy
    # Without a device there is nothing to pin host memory for, and torch refuses to.
    pinned = CPUOffloadPolicy(pin_memory=has_accelerator)
    assert FSDPConfig(cpu_offload=True).offload_policy == pinned
    assert FSDPConfig(cpu_offload=CPUOffloadPolicy(pin_memory=True)).offload_policy == pinned
    plain = CPUOffloadPolicy(pin_memory=False)
    assert FSDPConfig(cpu_offload=plain).offload_policy == plain


@pytest.mark.parametrize(
    ("argument", "option", "expected"),
    [
        (None, None, True),
        (None, True, True),
        (None, False, False),
        (True, None, True),
        (True, True, True),
        (False, None, False),
        (False, False, False),
    ],
)
def test_the_efficient_switch_has_two_names(
    argument: bool | None, option: bool | None, expected: bool
) -> None:
    config = FSDPConfig(cpu_ram_efficient_loading=option)
    assert efficient_switch(argument, config) is expected


@pytest.mark.parametrize("argument", [True, False])
def test_two_names_that_differ_are_refused(argument: bool) -> None:
    with pytest.raises(ConfigurationError) as caught:
        efficient_switch(argument, FSDPConfig(cpu_ram_efficient_loading=not argument))
    assert str(caught.value) == (
        f"memory_efficient_init={argument} and fsdp_config['cpu_ram_efficient_loading']={not argument} are the same "
        "switch. Give one of the two."
    )
