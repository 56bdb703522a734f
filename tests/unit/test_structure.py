"""What a model consists of: entries, ties, names, and the digest that ranks compare."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from shardwise.materialization import Entry, Structure, entries_of
from shardwise.materialization.structure import structure_difference
from tests.unit.models import Rotary, Tied


def by_name(model: nn.Module) -> dict[str, Entry]:
    return {entry.fqn: entry for entry in entries_of(model)}


def names_of(entry: Entry) -> list[str]:
    return [slot.fqn for slot in entry.slots]


def test_a_tied_parameter_is_one_entry_with_all_its_places() -> None:
    model = Tied()
    entry = by_name(model)["embed.weight"]
    assert names_of(entry) == ["embed.weight", "head.weight"]
    assert [slot.module for slot in entry.slots] == [model.embed, model.head]
    assert entry.tensor is model.embed.weight
    assert (entry.role, entry.persistent) == ("parameter", True)


def test_parameters_come_first_then_buffers_then_attributes() -> None:
    roles = [entry.role for entry in entries_of(Tied())]
    assert roles == sorted(roles, key=["parameter", "buffer", "attribute"].index)
    assert set(roles) == {"parameter", "buffer", "attribute"}


def test_persistence_is_read_from_the_module() -> None:
    entries = by_name(Tied())
    assert entries["norm.running_mean"].persistent
    assert entries["norm.num_batches_tracked"].tensor.ndim == 0
    assert not entries["rotary.inv_freq"].persistent


def test_a_buffer_registered_twice_is_one_entry() -> None:
    model = nn.ModuleList([nn.Module(), nn.Module()])
    table = torch.arange(3)
    for module in model:
        module.register_buffer("table", table)
    (entry,) = entries_of(model)
    assert names_of(entry) == ["0.table", "1.table"]


def test_a_module_in_two_places_is_one_entry_with_both_names() -> None:
    layer = nn.Linear(2, 2)
    assert [names_of(entry) for entry in entries_of(nn.Sequential(layer, layer))] == [
        ["0.weight", "1.weight"],
        ["0.bias", "1.bias"],
    ]


def test_an_attribute_that_aliases_a_buffer_has_the_buffers_tensor() -> None:
    model = Rotary()
    buffer, attribute = entries_of(model)
    assert (buffer.role, attribute.role) == ("buffer", "attribute")
    assert attribute.tensor is buffer.tensor
    assert names_of(attribute) == ["original_inv_freq"]


def test_a_plain_tensor_attribute_is_an_entry_of_its_own() -> None:
    model = nn.Module()
    model.scale = torch.ones(2)
    (entry,) = entries_of(model)
    assert (entry.role, entry.fqn, entry.persistent) == ("attribute", "scale", False)


def test_empty_places_are_left_out() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.register_buffer("nothing", None)
    model.note = "text"
    assert [entry.fqn for entry in entries_of(model)] == ["weight"]


def test_replace_reaches_every_place() -> None:
    model = Tied()
    entries = by_name(model)
    parameter, buffer = nn.Parameter(torch.zeros(6, 4)), torch.zeros(4)
    entries["embed.weight"].replace(parameter)
    entries["rotary.inv_freq"].replace(buffer)
    entries["rotary.original_inv_freq"].replace(buffer)
    assert model.embed.weight is parameter
    assert model.head.weight is parameter
    assert model.rotary.inv_freq is buffer
    assert model.rotary.original_inv_freq is buffer
    assert "inv_freq" in model.rotary._non_persistent_buffers_set


def test_replace_updates_a_modules_own_list_of_its_weights() -> None:
    model = nn.LSTM(2, 3)
    parameter = nn.Parameter(torch.zeros(12, 2))
    by_name(model)["weight_ih_l0"].replace(parameter)
    assert model.weight_ih_l0 is parameter
    assert model._flat_weights[0] is parameter


def test_wrappers_leave_names_as_they_were() -> None:
    plain, wrapped = Tied(), Tied()
    wrapped.norm = checkpoint_wrapper(wrapped.norm)
    compiled = torch.compile(wrapped, backend="eager")
    assert "_checkpoint_wrapped_module" in "".join(name for name, _ in compiled.named_modules())
    names = [names_of(entry) for entry in entries_of(compiled)]
    assert sorted(names) == sorted(names_of(entry) for entry in entries_of(plain))


def small(
    *, rows: int = 4, dtype: torch.dtype = torch.float32, frozen: bool = False, swapped: bool = False
) -> nn.Module:
    parts = {"first": nn.Linear(2, rows, bias=False, dtype=dtype), "second": nn.Linear(2, 2, bias=False)}
    parts["first"].requires_grad_(not frozen)
    model = nn.Module()
    for name in sorted(parts, reverse=swapped):
        model.add_module(name, parts[name])
    model.register_buffer("table", torch.zeros(3))
    return model


def digest(model: nn.Module) -> str:
    return Structure.of(entries_of(model)).digest


@pytest.mark.parametrize(
    "other",
    [
        lambda: small(rows=5),
        lambda: small(dtype=torch.bfloat16),
        lambda: small(frozen=True),
        lambda: small(swapped=True),
    ],
    ids=["shape", "dtype", "requires_grad", "order"],
)
def test_the_digest_tells_parameters_apart(other: Callable[[], nn.Module]) -> None:
    assert digest(small()) == digest(small())
    assert digest(other()) != digest(small())


def test_the_digest_ignores_values_and_devices() -> None:
    with torch.device("meta"):
        on_meta = small()
    assert digest(on_meta) == digest(small())


def test_the_digest_ignores_the_dtype_of_buffers_alone() -> None:
    cast, reshaped, not_saved = small(), small(), small()
    cast.table = cast.table.to(torch.bfloat16)
    reshaped.table = torch.zeros(4)
    not_saved.register_buffer("table", torch.zeros(3), persistent=False)
    assert digest(cast) == digest(small())
    assert digest(reshaped) != digest(small())
    assert digest(not_saved) != digest(small())


def test_the_digest_sees_ties() -> None:
    untied = Tied()
    untied.head.weight = nn.Parameter(untied.embed.weight.detach().clone())
    assert digest(untied) != digest(Tied())


def test_the_digest_ignores_plain_attributes() -> None:
    model = small()
    model.cache = torch.zeros(9)
    assert digest(model) == digest(small())


def test_lines_say_what_each_tensor_is() -> None:
    assert Structure.of(entries_of(Tied())).lines == (
        "parameter embed.weight = head.weight: (6, 4) float32 trainable",
        "parameter norm.weight: (4,) float32 trainable",
        "parameter norm.bias: (4,) float32 trainable",
        "buffer norm.running_mean: (4,) persistent",
        "buffer norm.running_var: (4,) persistent",
        "buffer norm.num_batches_tracked: () persistent",
        "buffer rotary.inv_freq: (4,) non-persistent",
    )


def difference(expected: nn.Module, got: nn.Module, *, limit: int = 5) -> str:
    texts = [Structure.of(entries_of(model)).to_json() for model in (expected, got)]
    return structure_difference(texts[0], texts[1], limit=limit)


def test_a_difference_names_both_sides() -> None:
    assert difference(small(), small(rows=5)) == (
        "expected parameter first.weight: (4, 2) float32 trainable, "
        "got parameter first.weight: (5, 2) float32 trainable"
    )


def test_a_difference_names_the_side_that_has_more() -> None:
    assert difference(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)) == (
        "expected parameter bias: (2,) float32 trainable"
    )
    assert difference(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)) == (
        "got parameter bias: (2,) float32 trainable"
    )


def test_a_difference_is_cut_at_the_limit() -> None:
    many = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(5)])
    text = difference(many, nn.Module(), limit=2)
    assert text == (
        "expected parameter 0: (1,) float32 trainable; parameter 1: (1,) float32 trainable and 3 more"
    )


def test_a_difference_in_order_alone_is_said() -> None:
    assert difference(small(), small(swapped=True)) == "the same tensors in another order"


def test_a_shared_module_is_walked_under_each_of_its_names() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(
        shared, nn.Sequential(nn.ReLU(), shared), nn.ModuleDict({"x": nn.Sequential(shared)})
    )
    model.register_module("nothing", None)
    expected = [
        f"{name}.{parameter}"
        for parameter in ("weight", "bias")
        for name, module in model.named_modules(remove_duplicate=False)
        if module is shared
    ]
    assert [slot.fqn for entry in entries_of(model) for slot in entry.slots] == expected
