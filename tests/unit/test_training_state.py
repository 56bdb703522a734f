"""What training takes: optimizers as torch makes them, gathered units by hand, and what must hold for any model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import ConfigurationError
from shardwise.planning.optimizer_states import OPTIMIZERS, optimizer_named
from shardwise.planning.parameters import PlannedParameter, PlannedUnit
from shardwise.planning.step_memory import UnitBytes, most_gathered_bytes
from shardwise.planning.training_state import TrainingState, pinned_bytes_of, training_state

MADE: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p),
    "adam": lambda p: torch.optim.Adam(p),
    "adamw-fused": lambda p: torch.optim.AdamW(p, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


def parameter(shard_numel: int, *, ranks: int = 4, **changes: Any) -> PlannedParameter:
    fields: dict[str, Any] = {
        "fqn": f"w{shard_numel}",
        "dtype": torch.bfloat16,
        "trainable": True,
        "sharded": True,
        "full_numel": shard_numel * ranks,
        "shard_numel": shard_numel,
        "stored_as_kept": True,
    }
    return PlannedParameter(**{**fields, **changes})


def unit(*parameters: PlannedParameter, is_root: bool = False, keep_gathered: bool = False) -> PlannedUnit:
    return PlannedUnit(parameters=parameters, is_root=is_root, keep_gathered=keep_gathered)


def state_of(*units: PlannedUnit, optimizer: str = "adamw", **changes: Any) -> TrainingState:
    fields: dict[str, Any] = {
        "shard_ranks": 4,
        "compute_dtype": torch.bfloat16,
        "reduce_dtype": torch.float32,
        "buffer_bytes": 0,
        "on_host": False,
        "offload": False,
    }
    return training_state(units, optimizer=optimizer_named(optimizer), **{**fields, **changes})


# --- optimizers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "none"])
def test_optimizers_keep_what_is_planned(name: str, dtype: torch.dtype) -> None:
    weights = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((7, 5), (11,))]
    optimizer = MADE[name](weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim > 0  # a step count is one number
    ]
    planned = state_of(unit(*(parameter(w.numel(), dtype=dtype) for w in weights)), optimizer=name)
    assert sum(value.nbytes for value in kept) == sum(planned.optimizer_states.values())
    assert {value.dtype for value in kept} == ({dtype} if OPTIMIZERS[name].tensors else set())


def test_an_unknown_optimizer_is_refused_with_the_list() -> None:
    with pytest.raises(
        ConfigurationError, match=r"expected one of adamw, .* got 'AdamW'\. Did you mean 'adamw'"
    ):
        optimizer_named("AdamW")


def test_a_state_is_counted_by_kind_dtype_and_place() -> None:
    units = (
        unit(parameter(10, fqn="norm", dtype=torch.float32), is_root=True, keep_gathered=True),
        unit(parameter(100, fqn="a"), parameter(3, fqn="frozen", trainable=False)),
    )
    state = state_of(*units)
    assert dict(state.parameters) == {"float32": 40, "bfloat16": 206}
    assert dict(state.gradients) == {"float32": 40, "bfloat16": 200}
    assert dict(state.optimizer_states) == {"float32": 80, "bfloat16": 400}
    assert state.sharded_bytes == 246 + 240 + 480
    assert state.step_bytes == 240  # the square roots of all second moments
    assert state.host_bytes == 0
    assert state.device_bytes == state.sharded_bytes + max(state.gathered_bytes, state.step_bytes)
    # Gathered and received in bf16 (the root stays), or gradients in bf16 and their reduction, in float32, beside it.
    assert state.gathered_bytes == 4 * 2 * 10 + 4 * 2 * 100 + 4 * 4 * 100 + 4 * 100
    assert (
        state_of(*units, reduce_dtype=None).gathered_bytes == 4 * 2 * 10 + 4 * 2 * 100 + 4 * 2 * 100 + 2 * 100
    )
    alone = state_of(*units, optimizer="none")
    assert (dict(alone.gradients), dict(alone.optimizer_states), alone.step_bytes) == ({}, {}, 0)
    assert dict(alone.parameters) == dict(state.parameters)


def test_cpu_ranks_step_by_parameter_and_hold_all_in_host_memory() -> None:
    state = state_of(unit(parameter(100), parameter(30)), on_host=True, buffer_bytes=8)
    assert state.step_bytes == 2 * 200
    assert state.device_bytes == 0
    assert state.host_bytes == 8 + state.sharded_bytes + max(state.gathered_bytes, state.step_bytes)


def test_offloaded_shards_are_pinned_and_the_device_has_what_is_gathered() -> None:
    units = (unit(parameter(100), parameter(64)),)
    state = state_of(*units, offload=True, buffer_bytes=8)
    assert state.pinned_bytes == 2 * (56 + 0)  # 200 bytes take 256, 128 take 128; so do gradients
    assert state.device_bytes == 8 + state.gathered_bytes
    assert state.host_bytes == 6 * 0 + 4 * 328 + 2 * 56 + state.step_bytes
    assert state.gathered_bytes == state_of(*units).gathered_bytes


@pytest.mark.parametrize(("nbytes", "taken"), [(0, 0), (1, 1), (2, 2), (3, 4), (4096, 4096), (4097, 8192)])
def test_pinned_memory_comes_in_powers_of_two(nbytes: int, taken: int) -> None:
    assert pinned_bytes_of(nbytes) == taken


# --- what is gathered ---


def of(gathered: int, *, keep: bool = False) -> UnitBytes:
    """A unit whose gradients are as large as its parameters, and reduced in twice the size."""
    return UnitBytes(
        gathered_bytes=gathered, gradient_bytes=gathered, reduced_bytes=2 * gathered, keep_gathered=keep
    )


def most_of(*units: UnitBytes, ranks: int, copies: bool = False) -> int:
    return most_gathered_bytes(units, shard_ranks=ranks, copies_to_reduce=copies)


def test_one_unit_is_gathered_and_reduced() -> None:
    # Gathered and received, 20; then gradients, the buffer they are reduced from, and this rank's part of the result, 10 + 20 + 5.
    assert most_of(of(10), ranks=4) == 35
    assert most_of(of(10), ranks=4, copies=True) == 55
    assert most_of(of(10), ranks=1) == most_of(of(10), ranks=1, copies=True) == 40
    frozen = UnitBytes(gathered_bytes=10, gradient_bytes=0, reduced_bytes=0, keep_gathered=False)
    assert most_of(frozen, ranks=4) == 20
    assert most_of(frozen, ranks=1) == 10
    assert most_of(ranks=4) == 0


def test_equal_layers_hold_two_gathered_one_gradient_and_one_reduction() -> None:
    # While the backward of one computes: it, the next one's buffer, its gradients, and the last one's reduction.
    assert most_of(*[of(10)] * 5, ranks=4) == 10 + 10 + 10 + 20
    assert most_of(*[of(10)] * 5, ranks=1) == 10 + 10 + 20


def test_what_stays_gathered_is_there_until_its_backward() -> None:
    # The root's 1 stays to the end. The head's 100 go when its gradients are there: these, their reduction, and the next one's buffer.
    assert most_of(of(1, keep=True), of(10), of(100, keep=True), ranks=4) == 1 + 10 + 100 + 200 + 50
    frozen_head = UnitBytes(gathered_bytes=100, gradient_bytes=0, reduced_bytes=0, keep_gathered=True)
    assert most_of(of(1, keep=True), of(10), frozen_head, ranks=4) == 1 + 10 * 0 + 100 + 100


sizes = st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=1, max_size=8)


@given(units=sizes, ranks=st.integers(1, 4))
def test_what_is_gathered_has_bounds(units: list[tuple[int, bool]], ranks: int) -> None:
    planned = [of(gathered, keep=keep) for gathered, keep in units]
    most = most_of(*planned, ranks=ranks)
    kept = sum(gathered for gathered, keep in units if keep)
    largest = max(gathered for gathered, _ in units)
    assert max(kept, 3 * largest) <= most  # gradients and the buffer that they are reduced from
    assert most <= kept + 6 * largest
    assert most <= most_of(*planned, ranks=ranks, copies=True) <= most + 2 * largest
    larger = [of(gathered + 1, keep=keep) for gathered, keep in units]
    assert most < most_of(*larger, ranks=ranks)


@given(
    shards=st.lists(st.integers(1, 10_000), min_size=1, max_size=6),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    offload=st.booleans(),
)
def test_memory_is_in_one_place_or_the_other(shards: list[int], optimizer: str, offload: bool) -> None:
    units = [unit(parameter(numel, fqn=str(n))) for n, numel in enumerate(shards)]
    state = state_of(*units, optimizer=optimizer, offload=offload)
    assert state.host_bytes + state.device_bytes >= state.sharded_bytes + state.gathered_bytes
    plain = state_of(*units, optimizer="none")
    assert state.sharded_bytes >= plain.sharded_bytes
    on_host = state_of(*units, optimizer=optimizer, on_host=True)
    assert on_host.device_bytes == 0
    assert on_host.gathered_bytes >= state_of(*units, optimizer=optimizer).gathered_bytes
