"""Gradients of several backward passes, averaged into one optimizer step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from shardwise.errors import ConfigurationError
from shardwise.materialization import drop_waiting_gradients, reduce_waiting_gradients
from shardwise.transformers_model.gradients import divide, multiply


class Accumulation:
    """Counts backward passes between optimizer steps.

    Losses are not scaled: at the step, gradients are divided by the number of passes that they are the sum of. So that number
    need not be known before, and both strategies do the same arithmetic.

    Args:
        steps: Backward passes to one optimizer step, where a call does not say otherwise.
        sync_each_batch: Reduce gradients over the ranks in every pass, so that a rank holds its shard of them alone; or only in
            the last one, which moves less and keeps whole gradients on every rank until then. Where a step is taken before
            the last one, they are reduced at the step.
    """

    def __init__(self, steps: int, *, sync_each_batch: bool) -> None:
        self.steps = _checked(steps)
        self.sync_each_batch = sync_each_batch
        self.passes = 0
        self._averaged_over = 1

    def begin_pass(self, model: nn.Module, shards: Iterable[torch.Tensor]) -> None:
        """Say whether the backward pass that begins now reduces gradients, and make those that are there a sum again.

        Args:
            model: Wrapped.
            shards: The parameters whose gradients were averaged, if any were.
        """
        if self._averaged_over > 1:
            multiply(shards, self._averaged_over)
            self._averaged_over = 1
        if not self.sync_each_batch and isinstance(model, FSDPModule):
            model.set_requires_gradient_sync((self.passes + 1) % self.steps == 0)

    def end_pass(self) -> None:
        """Count a backward pass."""
        self.passes += 1

    def is_complete(self, steps: int | None) -> bool:
        """Return whether the passes since the last step make a step.

        Args:
            steps: Passes to a step; None is the number that the facade was made with.
        """
        wanted = self.steps if steps is None else _checked(steps)
        return self.passes > 0 and self.passes % wanted == 0

    def finish(self, model: nn.Module) -> None:
        """Reduce what passes have left unreduced, and divide gradients by the number of passes, once.

        Args:
            model: Wrapped, with its shards in place.
        """
        if not self.sync_each_batch:
            reduce_waiting_gradients(model)
        if self._averaged_over == 1:
            divide(model.parameters(), self.passes)
            self._averaged_over = self.passes

    def drop(self, model: nn.Module) -> None:
        """Forget the passes, and the gradients that they have left unreduced."""
        if not self.sync_each_batch:
            drop_waiting_gradients(model)
        self.restart()

    def restart(self) -> None:
        """Forget the passes: their step was taken."""
        self.passes = 0
        self._averaged_over = 1


def _checked(steps: int) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ConfigurationError(f"gradient_accumulation_steps: expected an int of at least 1, got {steps!r}")
    return steps
