"""Gradients of several backward passes, averaged into one optimizer step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from shardwise.errors import ConfigurationError


class Accumulation:
    """Counts backward passes between optimizer steps.

    Losses are not scaled: at the step, gradients are divided by the number of passes that they are the sum of. So that number
    need not be known before, and both strategies do the same arithmetic.

    Args:
        steps: Backward passes to one optimizer step, where a call does not say otherwise.
        sync_each_batch: Reduce gradients over the ranks in every pass, so that a rank holds its shard of them alone; or only in
            the last one, which moves less and keeps whole gradients on every rank until then.
    """

    def __init__(self, steps: int, *, sync_each_batch: bool) -> None:
        self.steps = _checked(steps)
        self.sync_each_batch = sync_each_batch
        self.passes = 0
        self._is_averaged = False

    def begin_pass(self, model: nn.Module) -> None:
        """Say whether the backward pass that begins now reduces gradients."""
        if not self.sync_each_batch and isinstance(model, FSDPModule):
            model.set_requires_gradient_sync((self.passes + 1) % self.steps == 0)

    def end_pass(self) -> None:
        """Count a backward pass."""
        self.passes += 1
        self._is_averaged = False

    def is_complete(self, steps: int | None) -> bool:
        """Return whether the passes since the last step make a step.

        Args:
            steps: Passes to a step; None is the number that the facade was made with.

        Raises:
            ConfigurationError: It differs from that number, and reducing gradients depends on it.
        """
        wanted = self.steps if steps is None else _checked(steps)
        if not self.sync_each_batch and self.passes % self.steps != 0 and self.passes % wanted == 0:
            raise ConfigurationError(
                f"gradient_accumulation_steps={wanted}: expected {self.steps}, with which the model was made: with "
                "sync_each_batch=False gradients are reduced in the last of these passes. Pass the same number, or leave "
                "sync_each_batch on."
            )
        return self.passes > 0 and self.passes % wanted == 0

    def average(self, parameters: Iterable[torch.Tensor]) -> None:
        """Divide gradients by the number of passes, once."""
        if self._is_averaged or self.passes < 2:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).div_(self.passes)
        self._is_averaged = True

    def restart(self) -> None:
        """Forget the passes: their step was taken, or their gradients are gone."""
        self.passes = 0
        self._is_averaged = False


def _checked(steps: int) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ConfigurationError(f"gradient_accumulation_steps: expected an int of at least 1, got {steps!r}")
    return steps
