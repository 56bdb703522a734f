"""A model's parameters go to meta, and their values aside."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from shardwise.materialization import entries_of, take_values
from tests.unit.models import Tied


def test_every_parameter_goes_to_meta_and_keeps_its_form() -> None:
    model = Tied().to(torch.bfloat16)
    before = {name: (p.shape, p.dtype, p.stride()) for name, p in model.named_parameters()}
    take_values(entries_of(model), keep=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {name: (p.shape, p.dtype, p.stride()) for name, p in model.named_parameters()} == before


def test_ties_stay_ties() -> None:
    model = Tied()
    take_values(entries_of(model), keep=True)
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.is_meta


def test_requires_grad_and_python_attributes_are_kept() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    model.weight.tensor_parallel = "column"
    take_values(entries_of(model), keep=True)
    assert model.weight.requires_grad
    assert not model.bias.requires_grad
    assert model.weight.tensor_parallel == "column"


def test_buffers_and_attributes_stay_where_they_are() -> None:
    model = Tied()
    before = {entry.fqn: entry.tensor for entry in entries_of(model) if entry.role != "parameter"}
    take_values(entries_of(model), keep=False)
    after = {entry.fqn: entry.tensor for entry in entries_of(model) if entry.role != "parameter"}
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    assert model.rotary.original_inv_freq is model.rotary.inv_freq


def test_values_come_by_their_first_name_with_keep() -> None:
    model = Tied()
    expected = {entry.fqn: entry.tensor.detach().clone() for entry in entries_of(model)}
    addresses = {entry.fqn: entry.tensor.data_ptr() for entry in entries_of(model)}
    source = take_values(entries_of(model), keep=True)
    assert sorted(source) == sorted(expected)
    assert "head.weight" not in expected  # a tied weight is held once
    for name, value in expected.items():
        assert torch.equal(source.tensor(name), value)
        assert source.tensor(name).data_ptr() == addresses[name]  # handed over, not copied
        assert not source.tensor(name).requires_grad


def test_nothing_comes_without_keep() -> None:
    assert len(take_values(entries_of(Tied()), keep=False)) == 0


def test_a_model_on_meta_keeps_its_parameters() -> None:
    with torch.device("meta"):
        model = Tied()
    before = list(model.parameters())
    take_values(entries_of(model), keep=True)
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("make", [Tied, lambda: nn.LSTM(3, 4)], ids=["tied", "lstm"])
def test_the_full_parameters_are_freed_without_keep(make: Callable[[], nn.Module]) -> None:
    model = make()
    freed = [weakref.ref(parameter.untyped_storage()) for parameter in model.parameters()]
    take_values(entries_of(model), keep=False)
    gc.collect()
    assert [storage() for storage in freed] == [None] * len(freed)


def test_with_keep_the_source_alone_holds_the_values() -> None:
    model = Tied()
    parameters = [weakref.ref(parameter) for parameter in model.parameters()]
    storages = {entry.fqn: weakref.ref(entry.tensor.untyped_storage()) for entry in entries_of(model)[:3]}
    source = take_values(entries_of(model), keep=True)
    gc.collect()
    assert [parameter() for parameter in parameters] == [None] * len(parameters)
    for name, storage in storages.items():
        assert storage() is not None
        source.release(name)
        gc.collect()
        assert storage() is None
