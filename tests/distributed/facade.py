"""What the tests of the facade do alike: make one, train it, and train the same without it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import shardwise as sw
from tests.distributed.models import VOCABULARY
from tests.distributed.steps import (
    every_rank,
)

ROWS = 4  # of the whole job's batch; on four ranks one each
LEARNING_RATE, DECAY, MOST_NORM = 1e-2, 0.1, 0.5


def facade(directory: str | None, strategy: str, **arguments: Any) -> sw.TransformersModel:
    """Return a model in full precision, with float32 shards, that never waits long."""
    common = {"mixed_precision": "no", "dtype": torch.float32, "timeout": 60.0}
    return sw.TransformersModel(directory, strategy=strategy, **{**common, **arguments})


def with_optimizer(model: sw.TransformersModel) -> sw.TransformersModel:
    """Give a model the optimizer and scheduler that `plain_losses` uses."""
    model.set_optimizer("AdamW", lr=LEARNING_RATE, weight_decay=DECAY)
    model.set_lr_scheduler("linear", num_warmup_steps=2, num_training_steps=8)
    return model


def batch(step: int, *, rows: int = ROWS) -> torch.Tensor:
    """Return the whole job's tokens of a step."""
    return torch.randint(0, VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(step % 2))


def own(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return this rank's rows as inputs."""
    rows = tokens.chunk(dist.get_world_size())[dist.get_rank()]
    return {"input_ids": rows, "labels": rows}


def mean_of_ranks(loss: torch.Tensor) -> float:
    """Return the mean loss over the whole job's batch."""
    losses = every_rank(loss.item())
    return sum(losses) / len(losses)


def train(model: sw.TransformersModel, steps: range) -> list[float]:
    """Train and return the loss of each step."""
    losses = []
    for step in steps:
        outputs = model.forward_backward(own(batch(step)))
        losses.append(mean_of_ranks(outputs.loss))
        norm = model.clip_grad_and_step(max_grad_norm=MOST_NORM)
        assert norm is not None
        assert not isinstance(norm, DTensor)
    return losses


def plain_losses(model: nn.Module, steps: range) -> list[float]:
    """Train in this process alone, as a user without shardwise would, and return the loss of each step."""
    from transformers import get_scheduler

    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    groups = [
        {"params": matrices},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=LEARNING_RATE, weight_decay=DECAY
    )
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=8)
    model.train()
    losses = []
    for step in steps:
        tokens = batch(step)
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MOST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return losses


def close(one: list[float], other: list[float]) -> None:
    """Fail unless losses are equal up to the order of sums."""
    assert one == pytest.approx(other, rel=2e-5), f"{one} and {other}"


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Leave out what peft 0.21 says on transformers 5.23, whose property it asks for under its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
