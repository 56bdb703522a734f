"""Parameters that FSDP2 must leave alone or cannot train, and models that are sharded already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from shardwise.errors import AlreadyWrappedError, ConfigurationError, UnsupportedParameterError
from shardwise.materialization import entries_of
from shardwise.strategies.fsdp_config import FSDPConfig
from shardwise.strategies.mesh import resolve_mesh
from shardwise.strategies.wrapping import (
    ignored_parameters,
    plan_units,
    refuse_mixed_dtypes,
    refuse_wrapped,
)
from tests.unit.models import Layered, Tied


@contextmanager
def group_of_one() -> Iterator[None]:
    dist.init_process_group(store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def ignored(model: nn.Module, **options: Any) -> set[nn.Parameter]:
    return ignored_parameters(entries_of(model), FSDPConfig.from_dict(options))


def check_dtypes(model: nn.Module, **options: Any) -> None:
    config = FSDPConfig.from_dict(options)
    entries = entries_of(model)
    refuse_mixed_dtypes(model, plan_units(model, entries, config), ignored_parameters(entries, config))


def with_parameter(*shape: int, trainable: bool) -> nn.Module:
    model = nn.Linear(2, 2)
    model.extra = nn.Parameter(torch.zeros(shape), requires_grad=trainable)
    return model


def test_nothing_is_ignored_by_default() -> None:
    assert ignored(Layered()) == set()


def test_named_parameters_are_ignored() -> None:
    model = Layered()
    assert ignored(model, ignored_params=["before.weight", "layers.1.mix.bias"]) == {
        model.before.weight,
        model.layers[1].mix.bias,
    }


def test_a_tied_parameter_is_ignored_by_any_of_its_names() -> None:
    model = Tied()
    assert ignored(model, ignored_params="head.weight") == {model.embed.weight}


def test_unknown_names_are_listed() -> None:
    with pytest.raises(ConfigurationError) as caught:
        ignored(Layered(), ignored_params=["before.weight", "nowhere", "layers.9.weight"])
    message = str(caught.value)
    assert (
        "fsdp_config['ignored_params']: expected names of parameters, got nowhere, layers.9.weight" in message
    )
    assert "before.weight" not in message


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_frozen_parameters_that_cannot_be_sharded_stay_whole(shape: tuple[int, ...]) -> None:
    model = with_parameter(*shape, trainable=False)
    assert ignored(model) == {model.extra}


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_a_named_trainable_one_stays_whole(shape: tuple[int, ...]) -> None:
    model = with_parameter(*shape, trainable=True)
    assert ignored(model, ignored_params=["extra"]) == {model.extra}


def test_a_trainable_scalar_is_refused() -> None:
    with pytest.raises(UnsupportedParameterError) as caught:
        ignored(with_parameter(trainable=True))
    assert str(caught.value) == (
        "extra: expected a trainable parameter with at least one dim and one element, got a scalar which FSDP2 cannot "
        "train. Give it shape (1,), freeze it with requires_grad_(False), or name it in fsdp_config['ignored_params'] "
        "and synchronise its gradient yourself."
    )


def test_a_trainable_parameter_without_elements_is_refused() -> None:
    with pytest.raises(UnsupportedParameterError) as caught:
        ignored(with_parameter(3, 0, trainable=True))
    message = str(caught.value)
    assert message.startswith("extra: expected a trainable parameter with at least one dim and one element")
    assert "got a parameter without elements, shape (3, 0), which FSDP2 cannot train" in message
    assert "Remove it, freeze it with requires_grad_(False)" in message


def test_a_parameter_that_is_not_contiguous_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(3, 2).t())
    with pytest.raises(UnsupportedParameterError) as caught:
        ignored(model)
    assert str(caught.value) == (
        "weight: expected a contiguous parameter, got strides (1, 2) for shape (2, 3), which FSDP2 cannot shard. "
        "Replace it by a parameter of its .contiguous() values, or name it in fsdp_config['ignored_params'] and "
        "synchronise its gradient yourself."
    )
    assert ignored(model, ignored_params=["weight"]) == {model.weight}


def test_one_dtype_per_unit_is_accepted() -> None:
    model = Layered()
    model.layers[0].to(torch.bfloat16)
    check_dtypes(model)


def test_mixed_dtypes_in_a_unit_are_refused_with_an_example_of_each() -> None:
    model = Layered()
    model.layers[1].norm.to(torch.bfloat16)
    with pytest.raises(UnsupportedParameterError) as caught:
        check_dtypes(model)
    message = str(caught.value)
    assert message.startswith(
        "layers.1: expected trainable parameters of one dtype, got layers.1.mix.weight is float32, "
        "layers.1.norm.weight is bfloat16."
    )
    assert "dtype=torch.float32" in message
    assert "wrap_classes" in message


def test_mixed_dtypes_in_the_root_are_refused() -> None:
    model = Layered()
    model.after.to(torch.float64)
    with pytest.raises(
        UnsupportedParameterError, match=r"^the root unit: .*before.weight is float32, after.weight"
    ):
        check_dtypes(model)


def test_the_remedies_of_mixed_dtypes_work() -> None:
    model = Layered()
    model.layers[1].norm.to(torch.bfloat16)
    check_dtypes(model, wrap_classes=["Layer", "LayerNorm"])
    check_dtypes(model, ignored_params=["layers.1.norm.weight", "layers.1.norm.bias"])
    model.layers[1].norm.requires_grad_(False)
    check_dtypes(model)
    model.layers[1].norm.requires_grad_(True)
    check_dtypes(model.to(torch.float32))


def test_joined_units_share_one_dtype() -> None:
    model = Layered()
    model.layers[1].to(torch.bfloat16)
    check_dtypes(model)
    model.layers[1].mix.bias = model.layers[0].mix.bias
    with pytest.raises(UnsupportedParameterError, match=r"^layers.0 \+ layers.1: "):
        check_dtypes(model)


def test_a_model_that_is_not_sharded_passes() -> None:
    refuse_wrapped(Layered())


def test_a_sharded_part_is_named() -> None:
    model = Layered()
    with group_of_one():
        fully_shard(model.layers[1], mesh=resolve_mesh(None))
        with pytest.raises(AlreadyWrappedError) as caught:
            refuse_wrapped(model)
    message = str(caught.value)
    assert "expected a model that is not sharded, got layers.1 under fully_shard already" in message
    assert "Call wrap_model once per model" in message


def test_a_sharded_model_is_named_by_its_class() -> None:
    model = Layered()
    with group_of_one():
        fully_shard(model, mesh=resolve_mesh(None))
        with pytest.raises(AlreadyWrappedError, match="got FSDPLayered under fully_shard"):
            refuse_wrapped(model)


def test_a_parameter_that_is_distributed_otherwise_is_named() -> None:
    model = Layered()
    with group_of_one():
        weight = distribute_tensor(model.before.weight.detach(), resolve_mesh(None), [Shard(1)])
        model.before.weight = nn.Parameter(weight)
        with pytest.raises(UnsupportedParameterError) as caught:
            refuse_wrapped(model)
    message = str(caught.value)
    assert message.startswith(
        "before.weight: expected a plain tensor, got a DTensor with placements (Shard(dim=1),)"
    )
    assert "tensor parallelism cannot be combined" in message
