"""Parameters that get storage and stay the same objects: what is set on them stays, what cannot stay is refused."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shardwise as sw


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file({"weight": torch.ones(4, 4), "bias": torch.ones(4)}, tmp_path / "model.safetensors")
    return tmp_path


def meta_linear() -> nn.Linear:
    return nn.Linear(4, 4, device="meta")


@pytest.mark.parametrize("cpu_storage", ["map", "copy"])
def test_hooks_that_were_set_on_meta_run(checkpoint: Path, cpu_storage: Any) -> None:
    model, hits = meta_linear(), []
    handles = [
        model.weight.register_post_accumulate_grad_hook(lambda p: hits.append(("after", p is model.weight))),
        model.weight.register_hook(lambda grad: hits.append(("before", grad.shape)) or grad * 2),
    ]
    sw.materialize(model, checkpoint, cpu_storage=cpu_storage)
    model(torch.ones(1, 4)).sum().backward()
    assert hits == [("before", torch.Size((4, 4))), ("after", True)]
    assert model.weight.grad.eq(2).all()
    for handle in handles:
        handle.remove()
    model(torch.ones(1, 4)).sum().backward()
    assert len(hits) == 2
    model.weight.register_post_accumulate_grad_hook(lambda _: hits.append("new"))
    model(torch.ones(1, 4)).sum().backward()
    assert hits[2:] == ["new"]


def test_weak_references_are_refused_by_name(checkpoint: Path) -> None:
    model = meta_linear()
    reference = weakref.ref(model.bias)
    with pytest.raises(
        sw.UnsupportedParameterError, match=r"bias: expected .* nothing refers to weakly, got 1 weak"
    ):
        sw.materialize(model, checkpoint)
    assert all(parameter.is_meta for parameter in model.parameters())
    del reference
    sw.materialize(model, checkpoint)
    assert model.bias.eq(1).all()


@pytest.mark.parametrize("what", ["a view", "an AccumulateGrad node", "the output of a forward"])
def test_a_graph_is_refused_by_name(checkpoint: Path, what: str) -> None:
    model = meta_linear()
    if what == "a view":
        held: Any = model.weight.view(16)
    elif what == "the output of a forward":
        held = model(torch.empty(1, 4, device="meta"))
    else:
        held = torch.autograd.graph.get_gradient_edge(model.weight).node
        held.register_hook(lambda *_: None)  # would never be called again
    with pytest.raises(sw.UnsupportedParameterError, match=r"weight: expected .* no graph holds"):
        sw.materialize(model, checkpoint)
    assert all(parameter.is_meta for parameter in model.parameters())
    del held
    sw.materialize(model, checkpoint)
    assert model.weight.eq(1).all()
