"""Save and load: what the facade does with a training that is to go on later."""

from __future__ import annotations

import os
from pathlib import Path

from shardwise.errors import CallOrderError
from shardwise.materialization import Agreement, reshard
from shardwise.strategies import AccelerateStrategy, NativeFSDPStrategy
from shardwise.strategies.mesh import ranks_of
from shardwise.transformers_model.pending_save import PendingSave
from shardwise.transformers_model.resume import Training, load_training, save_training
from shardwise.transformers_model.stepping import Stepping


class Resuming(Stepping):
    """The part of the facade that writes a training's state and reads it."""

    strategy: AccelerateStrategy | NativeFSDPStrategy
    _is_wrapped: bool
    _name: str | None  # of the model

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write model, optimizer, scheduler, random numbers and step, each rank its shards, to go on from there.

        Frozen parameters are written too. All ranks call this together. The directory appears under its name when it is
        complete; it is for `load`, not for `from_pretrained`.

        Args:
            directory: Not there, or empty; on a file system that all ranks share.

        Raises:
            CallOrderError: Before the wrap, or between the backward passes of a step.
            CheckpointError: The directory has files in it.
        """
        self._require_saveable("save")
        save_training(
            self._training(), Path(directory).absolute(), step=self.global_step, agreement=self._agree("save")
        )

    def save_async(self, directory: str | os.PathLike[str]) -> PendingSave:
        """Copy what `save` writes into host memory, and write it from a thread while the training goes on.

        All ranks call this together, and later `finish` of what it returns, which gives the directory its name; one at a time.
        Until then each rank holds a second copy of its shards, and of the optimizer's, in host memory.

        Args:
            directory: As for `save`.

        Returns:
            The save; its `is_done` says whether this rank has written its part.

        Raises:
            CallOrderError: As `save`.
            CheckpointError: As `save`.
        """
        self._require_saveable("save_async")
        return PendingSave(
            self._training(), Path(directory).absolute(), step=self.global_step, agree=self._agree
        )

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Go on from what `save` wrote, on the same number of ranks or another; wraps the model if no forward has.

        A model that is wrapped here gets all of its values from the state: nothing of the model's own checkpoint is read but its
        headers. If the load fails then, the model has no values, and only another `load` gives it some.

        All ranks call this together, after the same `add_adapter_to_model`, `set_optimizer` and `set_lr_scheduler` as
        before the save. A rank that the saving job did not have keeps its own random numbers.

        Args:
            directory: On a file system that all ranks share.

        Raises:
            CallOrderError: Between the backward passes of a step.
            CheckpointError: It is damaged, or not the state of this training.
        """
        self._refuse_waiting_gradients("load")
        self._wrap(blank=True)
        self.global_step = load_training(
            self._training(), Path(directory).absolute(), agreement=self._agree("load")
        )
        self._is_blank = False
        self._drop_gradients()
        self._loss, self._has_stepped = None, False

    def _require_saveable(self, call: str) -> None:
        if not self._is_wrapped:
            raise CallOrderError(
                f"{call}: expected a wrapped model, got one before its first forward: there is nothing to save that the "
                "checkpoint does not hold."
            )
        self._refuse_blank(call)
        self._refuse_waiting_gradients(call)

    def _refuse_waiting_gradients(self, call: str) -> None:
        if self._accumulation.passes:
            raise CallOrderError(
                f"{call}: expected no gradients that wait for a step, got those of {self._accumulation.passes} backward passes, "
                f"which would be lost. Call {call} after step or clip_grad_and_step, or drop them: zero_grad(1)."
            )

    def _training(self) -> Training:
        reshard(self.model)
        return Training(
            model=self.model,
            optimizer=self._torch_optimizer,
            scheduler=self.lr_scheduler,
            scaler=self._engine.gradients.scaler,
            mesh=self.strategy.device_mesh,
            name=self._name,
        )

    def _agree(self, call: str) -> Agreement:
        return Agreement(
            ranks_of(self.strategy.device_mesh), timeout_seconds=self.strategy.timeout_seconds, call=call
        )
