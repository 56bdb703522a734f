"""How a step goes: through torch, or through an Accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from shardwise.strategies import AccelerateStrategy, NativeFSDPStrategy
from shardwise.transformers_model.gradients import ScaledGradients


class Engine(Protocol):
    """What drives backward and step."""

    gradients: ScaledGradients

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients; scaled for fp16."""

    def clip(
        self, parameters: Sequence[torch.Tensor], optimizer: Optimizer, *, max_norm: float, norm_type: float
    ) -> torch.Tensor:
        """Scale gradients down to a norm; return the norm that they had, a scalar, the same on all ranks."""

    def step(self, optimizer: Optimizer) -> bool:
        """Step; return False where the scaler found gradients that are not finite, and skipped it."""


class TorchEngine:
    """Torch alone, with the gradient scaler of the strategy where there is one."""

    def __init__(self, strategy: NativeFSDPStrategy) -> None:
        self.gradients = ScaledGradients(strategy.scaler, strategy.device_mesh)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients."""
        scaler = self.gradients.scaler
        torch.autograd.backward(loss if scaler is None else scaler.scale(loss))

    def clip(
        self, parameters: Sequence[torch.Tensor], optimizer: Optimizer, *, max_norm: float, norm_type: float
    ) -> torch.Tensor:
        """Clip by the norm of all gradients."""
        self.gradients.unscale(optimizer)
        return self.gradients.clip(parameters, max_norm=max_norm, norm_type=norm_type)

    def step(self, optimizer: Optimizer) -> bool:
        """Step the optimizer."""
        scaler = self.gradients.scaler
        if scaler is None:
            optimizer.step()
            return True
        self.gradients.unscale(optimizer)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        self.gradients.stepped()
        return bool(scaler.get_scale() >= before)


class AccelerateEngine:
    """An Accelerator, whose own counting of passes is put aside: the facade counts for both strategies.

    Its `clip_grad_norm_` is too: it takes each rank's norm of whole gradients for that of all ranks.
    """

    def __init__(self, strategy: AccelerateStrategy) -> None:
        self._accelerator = strategy.accelerator
        self.gradients = ScaledGradients(strategy.accelerator.scaler, strategy.device_mesh)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients through `Accelerator.backward`, which divides the loss by its own number of passes."""
        passes: int = self._accelerator.gradient_accumulation_steps
        self._accelerator.backward(loss if passes == 1 else loss * passes)

    def clip(
        self, parameters: Sequence[torch.Tensor], optimizer: Optimizer, *, max_norm: float, norm_type: float
    ) -> torch.Tensor:
        """Clip by the norm of all gradients."""
        self.gradients.unscale(_of_torch(optimizer))
        return self.gradients.clip(parameters, max_norm=max_norm, norm_type=norm_type)

    def step(self, optimizer: Optimizer) -> bool:
        """Step Accelerate's wrapper around the optimizer."""
        self.gradients.unscale(_of_torch(optimizer))
        self._accelerator.sync_gradients = True  # else the wrapper holds the step back
        optimizer.step()
        self.gradients.stepped()
        return not optimizer.step_was_skipped  # type: ignore[attr-defined]


def engine_of(strategy: AccelerateStrategy | NativeFSDPStrategy) -> Engine:
    """Return what drives the steps of a strategy's models."""
    return TorchEngine(strategy) if isinstance(strategy, NativeFSDPStrategy) else AccelerateEngine(strategy)


def _of_torch(optimizer: Any) -> Optimizer:
    """Return the optimizer inside Accelerate's wrapper."""
    inner: Optimizer = optimizer.optimizer
    return inner
