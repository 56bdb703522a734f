"""Shapes and dtypes that break people: each works like a single process, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import shardwise as sw
from shardwise.materialization import entries_of
from shardwise.testing import RankPool
from tests.distributed.models import TiedNet, check_equal, gathered, ties
from tests.distributed.steps import (
    backward,
    by_efficient,
    by_strategy,
    check_gradients,
    every_rank,
    make_strategy,
    own_rows,
)

pytestmark = pytest.mark.distributed


class Rows(nn.Module):
    """Parameters of many sizes of dim 0, every one of which takes part in the output."""

    SIZES = (1, 2, 3, 5, 17, 31, 97)

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.maps = nn.ModuleList(nn.Linear(8, rows) for rows in self.SIZES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.tanh(layer(x)).mean(-1) for layer in self.maps], -1)


class FrozenOddities(nn.Module):
    """A frozen scalar, a frozen parameter without elements, and a frozen layer of another dtype."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(8, 8)
        self.temperature = nn.Parameter(torch.rand(()) + 1, requires_grad=False)
        self.nothing = nn.Parameter(torch.empty(0, 4), requires_grad=False)
        self.codes = nn.Parameter(torch.arange(12, dtype=torch.int8).reshape(3, 4), requires_grad=False)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.first(x)) * self.temperature + self.nothing.sum()
        return self.last(hidden) + self.codes.sum().to(x.dtype)


class LargeRows(nn.Module):
    """Parameters larger than the smallest that travels unpacked, in even and uneven splits."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.even = nn.Linear(1024, 1200, bias=False)
        self.uneven = nn.Linear(1024, 1201)
        self.cube = nn.Parameter(torch.randn(12, 64, 1000))
        self.register_buffer("table", torch.randn(700_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.even(x).mean() + self.uneven(x).mean() + self.cube.mean() + self.table.mean()


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "rows": Rows,
    "frozen": FrozenOddities,
    "large": LargeRows,
}


def built(kind: str, *, efficient: bool, meta: bool) -> nn.Module:
    """Return a model with the source rank's values, and others or none on the other ranks."""
    if not efficient or dist.get_rank() == 0:
        return BUILDERS[kind]()
    if meta:
        with torch.device("meta"):
            return BUILDERS[kind]()
    return BUILDERS[kind](seed=dist.get_rank())


@by_strategy
@by_efficient
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_size_of_dim_0(pool: RankPool, strategy: str, efficient: bool, ranks: int) -> None:
    pool.run(train_and_compare, "rows", strategy, efficient, ranks=ranks)


@by_strategy
@by_efficient
@pytest.mark.parametrize("ranks", [1, 4])
def test_frozen_scalars_empty_parameters_and_other_dtypes(
    pool: RankPool, strategy: str, efficient: bool, ranks: int
) -> None:
    pool.run(train_and_compare, "frozen", strategy, efficient, ranks=ranks)


def train_and_compare(kind: str, name: str, efficient: bool) -> None:
    width = 8
    inputs = torch.randn(2 * dist.get_world_size(), width, generator=torch.Generator().manual_seed(5))
    reference = BUILDERS[kind]()
    reference(inputs).square().mean().backward()
    for meta in (True, False):
        strategy = make_strategy(name, memory_efficient_init=efficient)
        model = strategy.wrap_model(built(kind, efficient=efficient, meta=meta))
        check_equal(model, reference)
        backward(strategy, model(own_rows(inputs)).square().mean())
        check_gradients(model, reference)
        if not efficient:
            return


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_large_tensors_that_travel_unpacked(pool: RankPool, ranks: int) -> None:
    reports = pool.run(fill_large, ranks=ranks)
    # Both ways of travelling were taken: more than one bucket's worth, of even and uneven splits.
    assert all(count == reports[0] for count in reports)


def fill_large() -> int:
    strategy = make_strategy("native_fsdp")
    model = strategy.wrap_model(built("large", efficient=True, meta=True))
    check_equal(model, LargeRows())
    report = strategy.last_report
    own = sum(p.to_local().nbytes for p in model.parameters()) + model.table.nbytes
    received = sum(every_rank(own)[1:])
    assert report.network_bytes == report.predicted["network_bytes"] == received
    network_bytes: int = report.network_bytes
    return network_bytes


# --- ties in a module that is not from transformers ---


@by_strategy
@by_efficient
@pytest.mark.parametrize(
    "options", [{}, {"auto_wrap_policy": "none"}, {"wrap_classes": ["Embedding", "Linear"]}], ids=str
)
def test_a_plain_tied_module(pool: RankPool, strategy: str, efficient: bool, options: dict[str, Any]) -> None:
    pool.run(train_tied, strategy, efficient, options, ranks=3)


def train_tied(name: str, efficient: bool, options: dict[str, Any]) -> None:
    ids = torch.randint(0, 13, (2 * dist.get_world_size(), 6), generator=torch.Generator().manual_seed(5))
    reference = TiedNet()
    reference(ids).square().mean().backward()
    strategy = make_strategy(name, memory_efficient_init=efficient, fsdp_config=options)
    model = strategy.wrap_model(TiedNet(seed=dist.get_rank() if efficient else 0))
    assert model.embed.weight is model.head.weight
    assert ties(model) == {frozenset({"embed.weight", "head.weight"})}
    check_equal(model, reference)
    backward(strategy, model(own_rows(ids)).square().mean())
    check_gradients(model, reference)
    assert model.embed.weight is model.head.weight


@by_strategy
@by_efficient
def test_a_tie_between_a_module_and_its_inside(pool: RankPool, strategy: str, efficient: bool) -> None:
    pool.run(train_nested_tie, strategy, efficient, ranks=2)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.inner = nn.Linear(8, 8, bias=False)
        self.inner.weight = self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) @ self.weight


class NestedTie(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Outer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


def nested_tie(seed: int) -> NestedTie:
    torch.manual_seed(seed)
    return NestedTie()


def train_nested_tie(name: str, efficient: bool) -> None:
    inputs = torch.randn(2 * dist.get_world_size(), 8, generator=torch.Generator().manual_seed(5))
    strategy = make_strategy(
        name, memory_efficient_init=efficient, fsdp_config={"wrap_classes": [Outer, nn.Linear]}
    )
    model = strategy.wrap_model(nested_tie(dist.get_rank() if efficient else 0))
    reference = nested_tie(0)
    check_equal(model, reference)
    backward(strategy, model(own_rows(inputs)).square().mean())
    reference(inputs).square().mean().backward()
    check_gradients(model, reference)


# --- what FSDP2 cannot shard is refused by name, on every rank ---


class Odd(nn.Module):
    """A layer with one parameter that FSDP2 refuses or breaks on."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.odd = parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x)) + self.odd.sum()


def odd_parameter(kind: str) -> nn.Parameter:
    return {
        "scalar": lambda: nn.Parameter(torch.tensor(2.0)),
        "empty": lambda: nn.Parameter(torch.empty(0, 8)),
    }[kind]()


@by_strategy
@by_efficient
@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("scalar", ["odd", "scalar", "shape (1,)", "requires_grad_(False)", "ignored_params"]),
        ("empty", ["odd", "without elements", "(0, 8)", "requires_grad_(False)"]),
    ],
)
def test_trainable_parameters_that_cannot_be_sharded(
    pool: RankPool, strategy: str, efficient: bool, kind: str, texts: list[str]
) -> None:
    for error in pool.run_to_errors(wrap_odd, strategy, efficient, kind, ranks=2, timeout_seconds=90):
        assert isinstance(error, sw.UnsupportedParameterError), error
        for text in texts:
            assert text in str(error)


def wrap_odd(name: str, efficient: bool, kind: str) -> None:
    torch.manual_seed(0)
    make_strategy(name, memory_efficient_init=efficient).wrap_model(Odd(odd_parameter(kind)))


@by_strategy
@pytest.mark.parametrize("remedy", ["shape (1,)", "freeze", "ignored_params"])
def test_the_remedies_for_a_scalar_work(pool: RankPool, strategy: str, remedy: str) -> None:
    pool.run(apply_remedy, strategy, remedy, ranks=2)


def apply_remedy(name: str, remedy: str) -> None:
    scalar = nn.Parameter(torch.full((1,) if remedy == "shape (1,)" else (), 2.0 + dist.get_rank()))
    scalar.requires_grad_(remedy != "freeze")
    options = {"ignored_params": ["odd"]} if remedy == "ignored_params" else {}
    strategy = make_strategy(name, fsdp_config=options)
    model = strategy.wrap_model(Odd(scalar))
    assert gathered(model)["odd"].item() == 2.0  # the source rank's
    backward(strategy, model(torch.randn(2, 8)).sum())
    assert (model.odd.grad is None) == (remedy == "freeze")


@by_strategy
@by_efficient
def test_mixed_dtypes_of_trainable_parameters_in_one_layer(
    pool: RankPool, strategy: str, efficient: bool
) -> None:
    for error in pool.run_to_errors(wrap_mixed, strategy, efficient, False, ranks=2, timeout_seconds=90):
        assert isinstance(error, sw.UnsupportedParameterError), error
        for text in ("layers.0", "layers.0.0.weight is bfloat16", "layers.0.1.weight is float32", "dtype="):
            assert text in str(error)


@by_strategy
@by_efficient
def test_mixed_dtypes_work_where_the_odd_ones_are_frozen(
    pool: RankPool, strategy: str, efficient: bool
) -> None:
    pool.run(wrap_mixed, strategy, efficient, True, ranks=2)


def mixed_model(*, frozen: bool) -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.LayerNorm(8))
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    if frozen:
        block[1].requires_grad_(False)
    return model


def wrap_mixed(name: str, efficient: bool, frozen: bool) -> None:
    model = mixed_model(frozen=frozen)
    make_strategy(name, memory_efficient_init=efficient).wrap_model(model)
    check_equal(model, mixed_model(frozen=frozen))


# --- buffers and plain tensor attributes ---


class Aliases(nn.Module):
    """Plain tensor attributes that are a buffer, share with each other, or exist on one rank only."""

    def __init__(self, *, extra: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.register_buffer("table", torch.rand(5, dtype=torch.float64), persistent=False)
        self.table_again = self.table
        self.register_buffer("table_too", self.table, persistent=False)
        self.mean = torch.rand(3, dtype=torch.float16)
        self.mean_again = self.mean
        if extra:
            self.scratch = torch.rand(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x) * self.table.sum().float()


@by_strategy
@pytest.mark.parametrize("build", ["meta", "values", "broken alias"])
def test_plain_attributes_and_aliases_follow_the_source(pool: RankPool, strategy: str, build: str) -> None:
    answers = pool.run(fill_aliases, strategy, build, ranks=3)
    for answer in answers:
        for fqn, tensor in answers[0].items():
            assert answer[fqn].dtype == tensor.dtype
            assert torch.equal(answer[fqn], tensor), fqn


def fill_aliases(name: str, build: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(dist.get_rank())
    source = dist.get_rank() == 0
    if source or build != "meta":
        model = Aliases(extra=source)
    else:
        with torch.device("meta"):
            model = Aliases(extra=False)
    if not source and build == "broken alias":
        # As `.to("meta")` or a cast of the buffers leaves it: the attribute is no longer the buffer.
        model.table_again = model.table.clone()
        model.mean_again = model.mean.float()
    expected = model.table.clone() if source else None
    model = make_strategy(name).wrap_model(model)
    assert model.table_again is model.table
    assert model.table_too is model.table
    assert model.mean_again is model.mean
    assert model.table.dtype == torch.float64
    assert model._non_persistent_buffers_set == {"table", "table_too"}
    if source:
        assert torch.equal(model.table, expected)
        assert model.scratch.shape == (2,)
    assert not [e.fqn for e in entries_of(model) if e.tensor.is_meta]
    return {"table": model.table, "mean": model.mean}


@by_strategy
def test_a_tensor_that_only_an_empty_rank_has_is_refused(pool: RankPool, strategy: str) -> None:
    errors = pool.run_to_errors(wrap_extra_attribute, strategy, ranks=2, timeout_seconds=90)
    assert isinstance(errors[1], sw.LeftOnMetaError)
    assert isinstance(errors[0], sw.PeerError)
    for error in errors:
        assert "scratch" in str(error)
        assert "on meta" in str(error)


def wrap_extra_attribute(name: str) -> None:
    if dist.get_rank() == 0:
        model = Aliases(extra=False)
    else:
        with torch.device("meta"):
            model = Aliases(extra=True)
    make_strategy(name).wrap_model(model)


@by_strategy
def test_frozen_layers_between_trainable_ones(pool: RankPool, strategy: str) -> None:
    pool.run(train_frozen, strategy, ranks=3)


def train_frozen(name: str) -> None:
    inputs = torch.randn(2 * dist.get_world_size(), 8, generator=torch.Generator().manual_seed(5))
    models = [Rows(seed=0), Rows(seed=0 if dist.get_rank() == 0 else 9)]
    for model in models:
        for layer in list(model.maps)[::2]:
            layer.requires_grad_(False)
    reference, model = models
    strategy = make_strategy(name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = strategy.wrap_model(model, optimizer)
    check_equal(model, reference)
    reference(inputs).square().mean().backward()
    backward(strategy, model(own_rows(inputs)).square().mean())
    check_gradients(model, reference)
    frozen = {fqn for fqn, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 8
    assert all(
        isinstance(p, DTensor) and p.grad is None for fqn, p in model.named_parameters() if fqn in frozen
    )
    optimizer.step()
