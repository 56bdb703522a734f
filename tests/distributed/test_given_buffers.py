"""Buffers that no checkpoint holds, on several ranks: given by name or by a function, or listed in an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.steps import every_rank

pytestmark = pytest.mark.distributed


class Rotary(nn.Module):
    """Computes its buffers when it is built, and offers no way to do it again."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / torch.arange(1.0, size + 1), persistent=False)
        self.register_buffer("mask", torch.ones(size, dtype=torch.bool), persistent=False)


class Net(nn.Module):
    """Not from transformers; a weight, and non-persistent buffers in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6, bias=False)
        self.first, self.second = Rotary(3), Rotary(5)


GIVEN = {
    "first.inv_freq": torch.tensor([1.5, -0.0, 3.0], dtype=torch.float64),
    "first.mask": torch.tensor([True, False, True]),
    "second.inv_freq": torch.full((5,), 7.0),
    "second.mask": torch.zeros(5, dtype=torch.bool),
}


@pytest.fixture
def directory(tmp_path: Path) -> str:
    save_file({"proj.weight": torch.arange(24.0).view(6, 4)}, tmp_path / "model.safetensors")
    return str(tmp_path)


def meta_net() -> Net:
    with torch.device("meta"):
        model = Net()
    fully_shard(model)
    return model


def by_function(fqn: str, like: torch.Tensor) -> torch.Tensor | None:
    assert like.is_meta
    return GIVEN.get(fqn)


@pytest.mark.parametrize("way", ["by name", "function"])
def test_given_values_are_on_every_rank_in_the_models_dtype(pool: RankPool, directory: str, way: str) -> None:
    pool.run(fill_given, directory, way, ranks=2)


def fill_given(directory: str, way: str) -> None:
    model = meta_net()
    report = sw.materialize(model, directory, buffers=GIVEN if way == "by name" else by_function)
    assert torch.equal(model.proj.weight.full_tensor(), torch.arange(24.0).view(6, 4))
    found = dict(model.named_buffers())
    assert set(found) == set(GIVEN)
    for fqn, value in GIVEN.items():
        assert found[fqn].dtype == (torch.bool if fqn.endswith("mask") else torch.float32)
        assert torch.equal(found[fqn], value.to(found[fqn].dtype)), fqn
        assert report.origins[fqn] == "recomputed"
        with torch.no_grad():
            found[fqn].zero_()  # it is a buffer of this rank's own, not the caller's tensor of another dtype
    assert set(every_rank(tuple(report.origins.items()))) == {tuple(report.origins.items())}


@pytest.mark.parametrize("given", ["nothing", "some by name", "some by a function"])
def test_what_nothing_gives_is_listed_on_every_rank(pool: RankPool, directory: str, given: str) -> None:
    errors = pool.run_to_errors(fill_partly, directory, given, ranks=2)
    names = "first.inv_freq, first.mask, second.inv_freq, second.mask"
    if given != "nothing":
        names = "second.inv_freq, second.mask"
    assert {type(error) for error in errors} <= {sw.LeftOnMetaError, sw.PeerError}
    assert isinstance(errors[0], sw.LeftOnMetaError) or isinstance(errors[1], sw.LeftOnMetaError)
    for error in errors:
        assert f"expected values for every buffer, got none for {names}: they" in str(error)
        assert "Pass buffers= (values by name, or a function)" in str(error)


def fill_partly(directory: str, given: str) -> None:
    model = meta_net()
    some = {fqn: value for fqn, value in GIVEN.items() if fqn.startswith("first.")}
    buffers = {"nothing": None, "some by name": some, "some by a function": lambda fqn, _: some.get(fqn)}[
        given
    ]
    try:
        sw.materialize(model, directory, buffers=buffers)
    finally:
        assert all(parameter.is_meta for parameter in model.parameters()), "something was allocated"


def test_values_that_differ_between_ranks_are_refused_by_name(pool: RankPool, directory: str) -> None:
    errors = pool.run_to_errors(fill_differently, directory, ranks=2)
    assert {type(error) for error in errors} == {sw.RankMismatchError}
    for error in errors:
        assert "the values of a buffer on rank 1 is not that of rank 0" in str(error)
        assert "they differ in second.inv_freq. " in str(error)


def fill_differently(directory: str) -> None:
    other = {"second.inv_freq": torch.full((5,), float(dist.get_rank()))}
    sw.materialize(meta_net(), directory, buffers={**GIVEN, **other})
