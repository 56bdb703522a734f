"""One optimizer step of the whole job, and what ranks tell each other at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from shardwise.training.loss import summed_loss
from shardwise.training.memory import PeakMemory
from shardwise.training.order import part_of
from shardwise.training.tokens import TokenRows
from shardwise.transformers_model import TransformersModel


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """What a step was, the same on all ranks but for the seconds.

    Args:
        step: Number of steps that are taken now.
        loss: Mean over the predicted tokens of the step.
        learning_rate: With which it was taken.
        grad_norm: Before clipping; None where nothing is clipped.
        tokens: Of the step's rows.
        seconds: It took.
        peak_memory_bytes: Highest of any rank so far.
        is_stop_wanted: Whether any rank was told to end.
        is_save_done: Whether every rank has written its part of a checkpoint.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    tokens: int
    seconds: float
    peak_memory_bytes: int
    is_stop_wanted: bool
    is_save_done: bool

    def to_json(self) -> dict[str, Any]:
        """Return what is written down of a step."""
        return {
            "step": self.step,
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "seconds": round(self.seconds, 4),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


class Stepper:
    """Takes steps.

    Args:
        model: With optimizer and scheduler.
        data: To train on.
        passes: Backward passes of a step.
        max_grad_norm: To which gradients are clipped; None clips nothing.
    """

    def __init__(
        self, model: TransformersModel, data: TokenRows, *, passes: int, max_grad_norm: float | None
    ) -> None:
        self._model, self._data, self._passes, self._max_grad_norm = model, data, passes, max_grad_norm
        self._device = torch.device(model.strategy.device_mesh.device_type)
        self._memory = PeakMemory(self._device)

    def take(
        self, step: int, rows: list[int], *, wants_stop: Callable[[], bool], has_saved: Callable[[], bool]
    ) -> StepFigures:
        """Train on the whole job's rows of a step. All ranks call this together.

        Args:
            step: Its number, from 1.
            rows: Of the step, the same on all ranks.
            wants_stop: Says whether this rank was told to end.
            has_saved: Says whether this rank has written its part of a checkpoint.
        """
        started = time.perf_counter()
        model, ranks = self._model, dist.get_world_size()
        own = part_of(rows, rank=dist.get_rank(), ranks=ranks)
        predicted = max(1, self._data.predicted(rows))
        rate = float(model.optimizer.param_groups[0]["lr"])  # type: ignore[union-attr]
        total = torch.zeros((), device=self._device)
        for number in range(self._passes):
            tokens, labels = self._data.batch(part_of(own, rank=number, ranks=self._passes))
            outputs = model.forward(input_ids=tokens, use_cache=False)
            loss = summed_loss(outputs.logits, labels)
            total += loss.detach()
            # Gradients are averaged over ranks and passes; the loss is a mean over the tokens of all of them.
            model.backward(loss * (ranks * self._passes / predicted))
            del outputs, loss
        self._memory.look()  # gradients are all there
        norm = model.clip_grad_and_step(self._max_grad_norm, gradient_accumulation_steps=self._passes)
        told = _told_by_ranks(
            [float(total), wants_stop(), has_saved(), self._memory.look() / 2**20], self._device
        )
        return StepFigures(
            step=step,
            loss=sum(of_rank[0] for of_rank in told) / predicted,
            learning_rate=rate,
            grad_norm=None if norm is None else float(norm),
            tokens=len(rows) * self._data.summary.block_size,
            seconds=time.perf_counter() - started,
            peak_memory_bytes=int(max(of_rank[3] for of_rank in told) * 2**20),
            is_stop_wanted=any(of_rank[1] for of_rank in told),
            is_save_done=all(of_rank[2] for of_rank in told),
        )


def wanted_by_any(own: bool, device: torch.device) -> bool:
    """Return whether a rank wants something, the same on all ranks. All ranks call this together.

    Args:
        own: Whether this one does.
        device: Of collectives.
    """
    return any(of_rank[0] for of_rank in _told_by_ranks([float(own)], device))


def _told_by_ranks(own: list[float], device: torch.device) -> list[list[float]]:
    """Return every rank's figures; as one collective, which fails where a rank has died."""
    mine = torch.tensor(own, dtype=torch.float32, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return [of_rank.tolist() for of_rank in every]
