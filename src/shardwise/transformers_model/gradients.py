"""Gradients between backward and step: unscaled once, and clipped by one norm on all ranks.

Most are shards, which FSDP2 has averaged. Those of `ignored_params` are whole, and each rank may have its own; torch has no
operation over both kinds together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer


class ScaledGradients:
    """Gradients that a scaler may have scaled.

    Args:
        scaler: For fp16; None where nothing is scaled.
        mesh: That the model is sharded on.
    """

    def __init__(self, scaler: Any | None, mesh: DeviceMesh) -> None:
        self.scaler = scaler
        self._mesh = mesh
        self._are_unscaled = False

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide an optimizer's gradients by the scale, once between two steps."""
        if self.scaler is None or self._are_unscaled:
            return
        with _as_dtensors(optimizer, self._mesh):
            self.scaler.unscale_(optimizer)
        self._are_unscaled = True

    def scale_again(self, parameters: Iterable[torch.Tensor]) -> None:
        """Bring unscaled gradients to the scale of those that a further backward adds."""
        if self.scaler is not None and self._are_unscaled:
            scale = self.scaler.get_scale()
            multiply(parameters, scale)
            self.restart()

    def restart(self) -> None:
        """Take note that the unscaled gradients are gone, or scaled again, without a step."""
        if self.scaler is not None and self._are_unscaled:
            self.scaler.update(self.scaler.get_scale())  # else it unscales nothing until the next step
            self._are_unscaled = False

    def stepped(self) -> None:
        """Take note that the scaler has stepped and is updated."""
        self._are_unscaled = False

    def clip(self, parameters: Iterable[torch.Tensor], *, max_norm: float, norm_type: float) -> torch.Tensor:
        """Scale gradients down to a norm.

        Args:
            parameters: The same on all ranks.
            max_norm: At most this norm is left.
            norm_type: Of the p-norm.

        Returns:
            The norm that they had, a scalar, the same on all ranks. Of gradients that are whole it is the greatest of the
            ranks' norms, so that each rank scales its shards alike.
        """
        trained = [p for p in parameters if p.requires_grad]
        whole = [p for p in trained if not isinstance(p, DTensor)]
        sharded = [p for p in trained if isinstance(p, DTensor) and p.grad is not None]
        if not whole or (not sharded and self._mesh.size() == 1):
            return full(torch.nn.utils.clip_grad_norm_(trained, max_norm, norm_type))
        norms = [self._greatest(_norm_of(whole, norm_type))]
        if sharded:
            norms.append(full(_norm_of(sharded, norm_type)).to(norms[0]))
        total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        if sharded:
            mesh = sharded[0].grad.device_mesh  # type: ignore[union-attr]
            on_mesh = DTensor.from_local(total, mesh, run_check=False)
            torch.nn.utils.clip_grads_with_norm_(sharded, max_norm, on_mesh)
        torch.nn.utils.clip_grads_with_norm_(whole, max_norm, total)
        return total

    def _greatest(self, norm: torch.Tensor) -> torch.Tensor:
        # Gathered, and not reduced by the greatest, which may lose what is not a number.
        mine = norm.to(device=self._mesh.device_type, dtype=torch.float32).reshape(1)
        every = DTensor.from_local(mine, self._mesh, [Shard(0)] * self._mesh.ndim, run_check=False)
        return every.full_tensor().max()


def multiply(parameters: Iterable[torch.Tensor], factor: float) -> None:
    """Multiply the gradients that parameters have, in place."""
    for gradient in _local_gradients(parameters):
        gradient.mul_(factor)


def divide(parameters: Iterable[torch.Tensor], divisor: float) -> None:
    """Divide the gradients that parameters have, in place."""
    for gradient in _local_gradients(parameters):
        gradient.div_(divisor)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whole, on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local_gradients(parameters: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for gradient in (p.grad for p in parameters if p.grad is not None):
        yield gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _norm_of(parameters: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], norm_type)


@contextmanager
def _as_dtensors(optimizer: Optimizer, mesh: DeviceMesh) -> Iterator[None]:
    """Show whole gradients as replicated ones meanwhile: then one call takes them all, and its finding is that of all ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = sum(isinstance(p, DTensor) for p in parameters)
    if sharded == len(parameters) or (sharded == 0 and mesh.size() == 1):
        yield
        return
    groups = optimizer.param_groups
    optimizer.param_groups = [{"params": [_as_dtensor(p, mesh) for p in parameters if p.grad is not None]}]
    try:
        yield
    finally:
        optimizer.param_groups = groups


def _as_dtensor(parameter: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    if isinstance(parameter, DTensor) or parameter.grad is None:
        return parameter
    placements = [Replicate()] * mesh.ndim
    shown = DTensor.from_local(parameter.detach(), mesh, placements, run_check=False)
    shown.grad = DTensor.from_local(parameter.grad, mesh, placements, run_check=False)
    return shown
