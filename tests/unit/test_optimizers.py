"""Optimizers that were made before sharding: checked, emptied, and given the model's later parameters."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from shardwise.errors import OptimizerError
from shardwise.materialization import entries_of, take_values
from shardwise.strategies.optimizers import check_optimizers, drop_references
from tests.unit.models import Layered, Tied


def grouped(model: nn.Module) -> AdamW:
    """Make an optimizer of two groups with options of their own; names are out of the model's order."""
    return AdamW(
        [
            {"params": [model.after.weight, model.before.weight], "weight_decay": 0.5},
            {"params": [model.layers[1].norm.bias], "lr": 0.25, "betas": (0.5, 0.75)},
        ],
        lr=0.125,
    )


def replace_parameters(model: nn.Module) -> None:
    for entry in entries_of(model):
        if entry.role == "parameter":
            entry.replace(nn.Parameter(entry.tensor.detach().clone()))


def bound_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def options_of(optimizer: Optimizer) -> list[dict[str, object]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def test_groups_order_and_options_survive() -> None:
    model = Layered()
    optimizer = grouped(model)
    options = options_of(optimizer)
    groups = list(optimizer.param_groups)
    (record,) = check_optimizers(model, [optimizer])
    drop_references([record])
    assert [group["params"] for group in optimizer.param_groups] == [[], []]
    replace_parameters(model)
    record.rebind(model)
    assert bound_names(model, optimizer) == [["after.weight", "before.weight"], ["layers.1.norm.bias"]]
    assert options_of(optimizer) == options
    # The very dicts: schedulers and hooks may hold them.
    assert all(now is then for now, then in zip(optimizer.param_groups, groups, strict=True))


def test_a_check_changes_nothing() -> None:
    model = Layered()
    optimizer = grouped(model)
    before = [list(map(id, group["params"])) for group in optimizer.param_groups]
    (record,) = check_optimizers(model, [optimizer])
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == before
    assert record.optimizer is optimizer
    assert record.group_fqns == (("after.weight", "before.weight"), ("layers.1.norm.bias",))


def test_an_optimizer_of_meta_parameters_is_bound_by_object() -> None:
    with torch.device("meta"):
        model = Layered()
    optimizer = SGD(reversed(list(model.parameters())), lr=1.0)
    (record,) = check_optimizers(model, [optimizer])
    assert record.group_fqns == (tuple(name for name, _ in reversed(list(model.named_parameters()))),)


def test_parameters_without_elements_are_told_apart() -> None:
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(0)) for name in "abc"})  # all at address 0
    (record,) = check_optimizers(model, [SGD([model["c"], model["a"]], lr=1.0)])
    assert record.group_fqns == (("c", "a"),)


def test_a_tied_parameter_is_bound_once() -> None:
    model = Tied()
    optimizer = SGD(model.parameters(), lr=1.0)
    records = check_optimizers(model, [optimizer])
    drop_references(records)
    take_values(entries_of(model), keep=False)
    records[0].rebind(model)
    (group,) = optimizer.param_groups
    assert bound_names(model, optimizer) == [["embed.weight", "norm.weight", "norm.bias"]]
    assert group["params"][0] is model.head.weight


def test_several_optimizers_are_kept_apart() -> None:
    model = Layered()
    optimizers = [SGD(model.before.parameters(), lr=1.0), Adam(model.after.parameters())]
    records = check_optimizers(model, optimizers)
    drop_references(records)
    replace_parameters(model)
    for record in records:
        record.rebind(model)
    assert [record.optimizer for record in records] == optimizers
    assert bound_names(model, optimizers[0]) == [["before.weight", "before.bias"]]
    assert bound_names(model, optimizers[1]) == [["after.weight", "after.bias"]]


def test_a_rebound_optimizer_and_its_scheduler_train_the_new_parameters() -> None:
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    (record,) = check_optimizers(model, [optimizer])
    drop_references([record])
    replace_parameters(model)
    record.rebind(model)
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert torch.equal(model.weight, before - 1.0)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_dropped_references_keep_no_parameter_alive() -> None:
    model = Layered()
    optimizer = grouped(model)
    parameters = [weakref.ref(parameter) for parameter in model.parameters()]
    storages = [weakref.ref(parameter.untyped_storage()) for parameter in model.parameters()]
    records = check_optimizers(model, [optimizer])
    drop_references(records)
    take_values(entries_of(model), keep=False)
    gc.collect()
    assert [reference() for reference in parameters] == [None] * len(parameters)
    assert [reference() for reference in storages] == [None] * len(storages)
    assert len(optimizer.param_groups) == 2


def test_without_the_drop_the_optimizer_keeps_them_alive() -> None:
    # So that the test above is able to fail.
    model = Layered()
    optimizer = grouped(model)
    parameter = weakref.ref(model.after.weight)
    take_values(entries_of(model), keep=False)
    gc.collect()
    assert parameter() is optimizer.param_groups[0]["params"][0]


def test_a_foreign_parameter_is_refused_before_anything_changes() -> None:
    model, other = Layered(), nn.Linear(3, 7)
    mine = SGD(model.parameters(), lr=1.0)
    foreign = Adam(
        [{"params": model.before.parameters()}, {"params": [model.after.weight, *other.parameters()]}]
    )
    with pytest.raises(OptimizerError) as caught:
        check_optimizers(model, [mine, foreign])
    assert str(caught.value) == (
        "optimizer 1 (Adam), group 1: expected parameters of Layered, got 2 that it does not hold, of shapes (7, 3), "
        "(7,). Make the optimizer on this model's parameters, after the last change to them (resized embeddings, "
        "adapters, dtype), and before wrap_model."
    )
    assert len(mine.param_groups[0]["params"]) == len(list(model.parameters()))


def test_a_stepped_optimizer_is_refused() -> None:
    model = nn.Linear(2, 1)
    optimizer = Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(OptimizerError) as caught:
        check_optimizers(model, [optimizer])
    assert str(caught.value) == (
        "optimizer 0 (Adam): expected an optimizer that has not stepped, got state for 2 parameters of the unsharded "
        "model. Wrap before the first step, or load the state after wrapping with torch.distributed.checkpoint."
    )


def test_no_optimizers_are_no_records() -> None:
    assert check_optimizers(Layered(), []) == ()
