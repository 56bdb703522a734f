"""What the ranks of many tests do alike: make a strategy, a batch, a step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import shardwise as sw
from shardwise.materialization import Agreement, clean_fqn
from shardwise.materialization.call_store import CallStore
from tests.distributed.models import VOCABULARY, from_checkpoint

STRATEGIES = ("native_fsdp", "accelerate")
Checkpoint = Callable[[str], str]  # the fixture: a kind of model in, its directory out

by_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
WAYS = (
    "direct",
    "rank0",
    "eager",
)  # each rank reads its own bytes; rank 0 reads and sends; each rank loads all
by_way = pytest.mark.parametrize("way", WAYS)
by_efficient = pytest.mark.parametrize("efficient", [True, False], ids=["efficient", "eager"])
ROWS_PER_RANK = 2
SECONDS_TO_COME = 20.0  # that a rank has on a busy machine


def connected_ranks() -> AbstractContextManager[Any]:
    """Let ranks of the pool, which meet through a file, connect to each other as those that meet over a network do."""
    return mock.patch.object(CallStore, "host_address", ("127.0.0.1", 1))


def meet_over_the_network() -> None:
    """Give ranks of the pool, whose store is a file, a store as launchers make it. Each rank has one connection to it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    store = dist.TCPStore("127.0.0.1", 0, ranks, True, wait_for_workers=False) if rank == 0 else None
    port = [store.port if store is not None else None]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    if store is None:
        store = dist.TCPStore("127.0.0.1", port[0], ranks, False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))


def make_strategy(name: str, **arguments: Any) -> Any:
    """Return a strategy by its name; full precision unless told otherwise, and never a long wait."""
    made = {"native_fsdp": sw.NativeFSDPStrategy, "accelerate": sw.AccelerateStrategy}[name]
    return made(**{"mixed_precision": "no", "timeout": 60.0, **arguments})


def load(strategy: Any, directory: str, **arguments: Any) -> nn.Module:
    """Load a causal language model through a strategy; on rank 0 alone unless told otherwise."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = strategy.load_pretrained(
        AutoModelForCausalLM, directory, **{"defer": False, **arguments}
    )
    return model


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer under Accelerate's wrapper, if there is one."""
    return optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer


def token_batch(*, length: int = 16) -> torch.Tensor:
    """Return the whole job's tokens; `own_rows` cuts this rank's part."""
    rows = ROWS_PER_RANK * dist.get_world_size()
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))


def own_rows(batch: torch.Tensor) -> torch.Tensor:
    """Return this rank's rows of the whole job's batch."""
    return batch[dist.get_rank() * ROWS_PER_RANK :][:ROWS_PER_RANK]


def backward(strategy: Any, loss: torch.Tensor) -> None:
    """Run backward the way that the strategy's users do."""
    if isinstance(strategy, sw.AccelerateStrategy):
        strategy.accelerator.backward(loss)
    else:
        loss.backward()


def language_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of a causal language model over a batch."""
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def full_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every gradient whole, by clean name; all ranks call it together."""
    gradients = {}
    for fqn, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            gradients[clean_fqn(fqn)] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return gradients


def check_gradients(model: nn.Module, expected: nn.Module) -> None:
    """Fail unless every gradient of a sharded model is that of a model in this process alone."""
    got, wanted = full_gradients(model), full_gradients(expected)
    assert list(got) == list(wanted), f"gradients for {set(got) ^ set(wanted)} on one side only"
    for fqn, gradient in wanted.items():
        torch.testing.assert_close(
            got[fqn], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, fqn=fqn: f"{fqn}: {m}"
        )


def reference_gradients(directory: str) -> nn.Module:
    """Return a single-process model in float32 after backward over the whole job's batch."""
    reference = from_checkpoint(directory, dtype=torch.float32)
    language_loss(reference, token_batch()).backward()
    return reference


def reshard_all(model: nn.Module) -> None:
    """Free every gathered parameter."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def every_rank(value: Any) -> list[Any]:
    """Return each rank's value, in the order of ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def naming_only(late: int) -> Iterator[mock.Mock]:
    """Let a rank that asks which ones are late ask again until none is but one: on a busy machine the others are on their way."""
    late_of = Agreement._late

    def none_but_it(self: Agreement, key_of_rank: Mapping[int, str]) -> list[int]:
        deadline = time.monotonic() + SECONDS_TO_COME
        while (found := late_of(self, key_of_rank)) not in ([], [late]) and time.monotonic() < deadline:
            time.sleep(0.01)
        return found

    with mock.patch.object(Agreement, "_late", autospec=True, side_effect=none_but_it) as asked:
        yield asked


@contextmanager
def logged() -> Iterator[list[str]]:
    """Collect what shardwise warns of in the log while the body runs."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("shardwise")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
