"""Prefixes that `torch.compile` and activation checkpointing put before names: case 55."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import DTensor

from shardwise.materialization import clean_fqn
from shardwise.testing import RankPool
from tests.distributed.models import gathered, named_tensors, same_bytes
from tests.distributed.steps import (
    Checkpoint,
    backward,
    by_strategy,
    check_gradients,
    language_loss,
    load,
    make_strategy,
    own_rows,
    reference_gradients,
    token_batch,
)

pytestmark = pytest.mark.distributed

ORDERS = (
    "checkpointing by the user",
    "compile the module in place, then wrap",
    "wrap, then compile",
    "compile, then wrap",
)


@by_strategy
@pytest.mark.parametrize("by_option", [True, False], ids=["checkpointing by option", "other orders"])
@pytest.mark.parametrize("way", ["direct", "rank0"])
def test_case_55_prefixes_of_wrappers_do_not_break_names(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, by_option: bool, way: str
) -> None:
    """Names with `_orig_mod` or `_checkpoint_wrapped_module` in them found nothing in the checkpoint."""
    pool.run(wrap_in_orders, checkpoint("qwen3_tied"), strategy, by_option, way, ranks=2)


def wrap_in_orders(directory: str, name: str, by_option: bool, way: str) -> None:
    for order in ("none",) if by_option else ORDERS:
        strategy = make_strategy(name, fsdp_config={"activation_checkpointing": by_option})
        try:
            wrap_in_order(directory, strategy, order, way)
        except Exception as error:
            error.add_note(f"order: {order}")
            raise


def wrap_in_order(directory: str, strategy: Any, order: str, way: str) -> None:
    model: Any = load(strategy, directory, dtype=torch.float32, defer=way == "direct")
    if order == "checkpointing by the user":
        layers = model.model.layers
        for index, layer in enumerate(layers):
            layers[index] = checkpoint_wrapper(layer)
    elif order == "compile the module in place, then wrap":
        model.compile(backend="eager")
    elif order == "compile, then wrap":
        model = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = strategy.wrap_model(model, optimizer)
    if order == "wrap, then compile":
        model = torch.compile(model, backend="eager")
    reference = reference_gradients(directory)
    got, wanted = gathered(model), dict(named_tensors(reference))
    assert set(got) == set(wanted)
    for fqn, tensor in wanted.items():
        assert same_bytes(got[fqn], tensor), fqn
    sharded = [isinstance(p, DTensor) for p in model.parameters()]
    assert all(sharded)
    plain = strategy.unwrap_model(model)
    assert "OptimizedModule" not in type(plain).__name__
    model.train()
    backward(strategy, language_loss(model, own_rows(token_batch())))
    check_gradients(plain, reference)
    assert {clean_fqn(fqn) for fqn, _ in plain.named_parameters()} == {
        fqn for fqn, _ in reference.named_parameters()
    }
