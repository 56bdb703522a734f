"""Forward, backward, step: what the facade does with a model once it is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.errors import CallOrderError, ConfigurationError
from shardwise.materialization import reshard
from shardwise.transformers_model.accumulation import Accumulation
from shardwise.transformers_model.engines import Engine


class Stepping(ABC):
    """The part of the facade that runs at each step; the rest says what the model, optimizer and scheduler are."""

    model: nn.Module
    optimizer: Optimizer | None
    lr_scheduler: Any | None
    global_step: int
    _accumulation: Accumulation
    _engine: Engine
    _device: torch.device
    _torch_optimizer: Optimizer | None
    _loss: torch.Tensor | None
    _has_stepped: bool
    _is_blank: bool

    @abstractmethod
    def _wrap(self, *, blank: bool = False) -> None:
        """Wrap the model, if it is not yet; blank, it gets storage and its values are read from nowhere."""

    def forward(self, inputs: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Run the model, which the first call wraps.

        Args:
            inputs: Of the model; tensors are moved to the device. With `labels` the outputs have a loss, a scalar that is the
                mean over this rank's rows.
            **kwargs: More of them.

        Returns:
            The model's outputs.

        Raises:
            ConfigurationError: `inputs` is not a mapping.
        """
        self._wrap()
        self._refuse_blank("forward")
        outputs = self.model(**self._on_device(inputs, kwargs))
        self._loss = _loss_of(outputs)
        return outputs

    def forward_only(self, inputs: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Run the model in eval mode and without gradients; its mode is afterwards as before. Otherwise as `forward`."""
        self._wrap()
        self._refuse_blank("forward_only")
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return self.model(**self._on_device(inputs, kwargs))
        finally:
            self.model.train(training)
            reshard(self.model)  # what FSDP2 keeps gathered for a backward, which does not come

    def backward(self, loss: torch.Tensor | None = None) -> None:
        """Add gradients of a loss to those that are there.

        Args:
            loss: Scalar, this rank's mean; None is that of the last `forward`.

        Raises:
            CallOrderError: There is none.
        """
        loss = self._loss if loss is None else loss
        if loss is None:
            raise CallOrderError(
                "backward: expected a loss, got none: no forward was run since the last backward, or its outputs have no loss. "
                "Call forward with labels=, or pass a loss."
            )
        self._loss = None
        shards = self._shards()
        self._engine.gradients.scale_again(shards)
        self._accumulation.begin_pass(self.model, shards)
        self._engine.backward(loss)
        self._accumulation.end_pass()

    def forward_backward(self, inputs: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Run `forward` and `backward`.

        Returns:
            The model's outputs; the loss has no graph any more.
        """
        outputs = self.forward(inputs, **kwargs)
        self.backward()
        return outputs

    def clip_grad_norm(
        self,
        max_grad_norm: float = 1.0,
        norm_type: float = 2.0,
        gradient_accumulation_steps: int | None = None,
    ) -> torch.Tensor | None:
        """Scale gradients down to a norm, over all ranks and parameters; nothing between optimizer steps.

        Args:
            max_grad_norm: At most this norm is left.
            norm_type: Of the p-norm.
            gradient_accumulation_steps: In place of the number that the model was made with.

        Returns:
            The norm that the averaged gradients had, a scalar; None where nothing was done.

        Raises:
            CallOrderError: There is no optimizer, or no backward.
        """
        optimizer = self._stepping("clip_grad_norm")
        if not self._accumulation.is_complete(gradient_accumulation_steps):
            return None
        self._accumulation.finish(self.model)
        return self._engine.clip(
            list(self.model.parameters()), optimizer, max_norm=max_grad_norm, norm_type=norm_type
        )

    def step(self, gradient_accumulation_steps: int | None = None) -> bool:
        """Take an optimizer step with the averaged gradients, if enough backward passes were run; else nothing.

        Args:
            gradient_accumulation_steps: In place of the number that the model was made with; 1 takes what is there.

        Returns:
            Whether parameters have changed: False between steps, and where fp16 gradients were not finite.

        Raises:
            CallOrderError: There is no optimizer, or no backward since the last step.
        """
        optimizer = self._stepping("step")
        self._has_stepped = False
        if not self._accumulation.is_complete(gradient_accumulation_steps):
            return False
        self._accumulation.finish(self.model)
        if self._engine.step(optimizer):
            self._note_step()
        self._accumulation.restart()
        return self._has_stepped

    def zero_grad(self, gradient_accumulation_steps: int | None = None) -> None:
        """Drop gradients; nothing while they add up to a step.

        Args:
            gradient_accumulation_steps: In place of the number that the model was made with; 1 drops what is there.
        """
        accumulation = self._accumulation
        if accumulation.passes == 0 or accumulation.is_complete(gradient_accumulation_steps):
            self._drop_gradients()

    def lr_step(self) -> None:
        """Advance the scheduler, once for each optimizer step that was really taken; else nothing.

        Raises:
            CallOrderError: There is no scheduler.
        """
        if self.lr_scheduler is None:
            raise CallOrderError("lr_step: expected a scheduler, got none. Call set_lr_scheduler first.")
        if self._has_stepped:
            self.lr_scheduler.step()
            self._has_stepped = False

    def clip_grad_and_step(
        self,
        max_grad_norm: float | None = 1.0,
        norm_type: float = 2.0,
        gradient_accumulation_steps: int | None = None,
    ) -> torch.Tensor | None:
        """Clip, step, drop gradients and advance the scheduler, if enough backward passes were run; else nothing.

        Args:
            max_grad_norm: At most this norm is left; None clips nothing.
            norm_type: Of the p-norm.
            gradient_accumulation_steps: In place of the number that the model was made with.

        Returns:
            The norm before clipping, a scalar; None where nothing was done or clipped.

        Raises:
            CallOrderError: There is no optimizer, or no backward since the last step.
        """
        self._stepping("clip_grad_and_step")
        if not self._accumulation.is_complete(gradient_accumulation_steps):
            return None
        norm = None
        if max_grad_norm is not None:
            norm = self.clip_grad_norm(max_grad_norm, norm_type, gradient_accumulation_steps)
        self.step(gradient_accumulation_steps)
        self.zero_grad()
        if self.lr_scheduler is not None:
            self.lr_step()
        return norm

    def _stepping(self, call: str) -> Optimizer:
        if self.optimizer is None:
            raise CallOrderError(f"{call}: expected an optimizer, got none. Call set_optimizer first.")
        if not self._accumulation.passes:
            raise CallOrderError(
                f"{call}: expected gradients, got none: no backward was run since the last step. Call forward_backward, or "
                "forward and backward, first."
            )
        reshard(self.model)  # after a forward without a backward: gradients are those of the shards
        return self.optimizer

    def _refuse_blank(self, call: str) -> None:
        if self._is_blank:
            raise CallOrderError(
                f"{call}: expected a model with values, got one that was wrapped for a load that failed: its values were to come "
                "from there. Load another state, or make the model anew."
            )

    def _drop_gradients(self) -> None:
        if (
            self._torch_optimizer is not None
        ):  # its shards, also where a forward has put gathered parameters in their place
            self._torch_optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        self._accumulation.drop(self.model)
        self._engine.gradients.restart()

    def _note_step(self, *_: Any) -> None:
        """Count a step with the gradients of backward passes; the optimizer calls this too, for steps of the user's own."""
        if self._accumulation.passes:
            self._accumulation.restart()
            self._engine.gradients.stepped()
            self.global_step += 1
            self._has_stepped = True

    def _shards(self) -> list[torch.Tensor]:
        """Return the optimizer's parameters: shards, also where a forward has put gathered ones in their place."""
        groups = [] if self._torch_optimizer is None else self._torch_optimizer.param_groups
        return [parameter for group in groups for parameter in group["params"]]

    def _on_device(self, inputs: Mapping[str, Any] | None, more: Mapping[str, Any]) -> dict[str, Any]:
        if inputs is not None and not isinstance(inputs, Mapping):
            raise ConfigurationError(
                f"forward: expected a mapping of the model's inputs, such as a tokenizer gives, got {type(inputs).__name__}. Name "
                "them: forward(input_ids=..., labels=...)."
            )
        together = {**(inputs or {}), **more}
        return {
            key: value.to(self._device) if isinstance(value, torch.Tensor) else value
            for key, value in together.items()
        }


def _loss_of(outputs: Any) -> torch.Tensor | None:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return loss if isinstance(loss, torch.Tensor) else None
