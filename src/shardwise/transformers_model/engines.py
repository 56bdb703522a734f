"""How a step goes: through torch, or through an Accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardwise.strategies import AccelerateStrategy, NativeFSDPStrategy


class Engine(Protocol):
    """What drives backward and step."""

    @property
    def scaler(self) -> Any | None:
        """The gradient scaler, for fp16."""

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
        self.scaler = strategy.scaler

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients."""
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))

    def clip(
        self, parameters: Sequence[torch.Tensor], optimizer: Optimizer, *, max_norm: float, norm_type: float
    ) -> torch.Tensor:
        """Clip sharded and whole gradients by the norm of all of them."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        held = [p for p in parameters if p.grad is not None]
        sharded = [p for p in held if isinstance(p.grad, DTensor)]
        plain = [p for p in held if not isinstance(p.grad, DTensor)]  # of ignored_params
        if not sharded or not plain:
            return _whole(torch.nn.utils.clip_grad_norm_(held, max_norm, norm_type))
        # torch has no operation over sharded and whole tensors together.
        norms = [
            _whole(torch.nn.utils.get_total_norm([p.grad for p in some if p.grad is not None], norm_type))
            for some in (sharded, plain)
        ]
        total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        mesh = sharded[0].grad.device_mesh  # type: ignore[union-attr]
        on_mesh = DTensor.from_local(total, mesh, run_check=False)
        torch.nn.utils.clip_grads_with_norm_(sharded, max_norm, on_mesh)
        torch.nn.utils.clip_grads_with_norm_(plain, max_norm, total)
        return total

    def step(self, optimizer: Optimizer) -> bool:
        """Step the optimizer."""
        if self.scaler is None:
            optimizer.step()
            return True
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before


class AccelerateEngine:
    """An Accelerator, whose own counting of passes is put aside: the facade counts for both strategies."""

    def __init__(self, strategy: AccelerateStrategy) -> None:
        self._accelerator = strategy.accelerator
        self.scaler = strategy.accelerator.scaler

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients through `Accelerator.backward`, which divides the loss by its own number of passes."""
        passes: int = self._accelerator.gradient_accumulation_steps
        self._accelerator.backward(loss if passes == 1 else loss * passes)

    def clip(
        self, parameters: Sequence[torch.Tensor], optimizer: Optimizer, *, max_norm: float, norm_type: float
    ) -> torch.Tensor:
        """Clip through `Accelerator.clip_grad_norm_`, which unscales."""
        norm: torch.Tensor = self._accelerator.clip_grad_norm_(parameters, max_norm, norm_type=norm_type)
        return _whole(norm)

    def step(self, optimizer: Optimizer) -> bool:
        """Step Accelerate's wrapper around the optimizer."""
        self._accelerator.sync_gradients = True  # else the wrapper holds the step back
        optimizer.step()
        return not optimizer.step_was_skipped  # type: ignore[attr-defined]


def engine_of(strategy: AccelerateStrategy | NativeFSDPStrategy) -> Engine:
    """Return what drives the steps of a strategy's models."""
    return TorchEngine(strategy) if isinstance(strategy, NativeFSDPStrategy) else AccelerateEngine(strategy)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
