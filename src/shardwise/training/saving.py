"""When a training's checkpoints are written, at once or while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardwise.materialization import Agreement
from shardwise.training.checkpoints import directory_of, remove, remove_old, remove_unfinished
from shardwise.transformers_model import PendingSave, TransformersModel
from shardwise.transformers_model.sealed import seal


class Saver:
    """Writes checkpoints of one training. All ranks make the same calls together.

    Args:
        model: That is trained.
        folder: Of the checkpoints.
        run: What the training is, for `run.json`.
        keep: How many of the newest are kept; None keeps all.
        agree: Makes the agreement of a call.
    """

    def __init__(
        self,
        model: TransformersModel,
        folder: Path,
        *,
        run: Mapping[str, Any],
        keep: int | None,
        agree: Callable[[str], Agreement],
    ) -> None:
        self._model, self._folder, self._run, self._keep, self._agree = model, folder, run, keep, agree
        self._pending: PendingSave | None = None
        self._pending_step = 0
        self.saved_step = -1

    @property
    def is_done(self) -> bool:
        """Whether this rank has written its part of the checkpoint that is being written, if any is."""
        return self._pending is not None and self._pending.is_done

    def save(self, step: int) -> Path:
        """Write a checkpoint, and return its directory."""
        self.finish()
        directory = self._make_room(step)
        if self.saved_step != step:
            self._model.save(directory)
            self._seal(directory, step)
        return directory

    def begin(self, step: int) -> None:
        """Begin to write a checkpoint; `finish` ends it."""
        self.finish()
        self._pending = self._model.save_async(self._make_room(step))
        self._pending_step = step

    def finish(self) -> None:
        """End the checkpoint that is being written, if any is."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.finish()
            self._seal(directory_of(self._folder, self._pending_step), self._pending_step)

    def _make_room(self, step: int) -> Path:
        """Remove what lies where the checkpoint goes: one that was refused."""
        directory = directory_of(self._folder, step)
        agreement = self._agree("make room")
        with agreement.phase("remove"):
            if agreement.rank == agreement.ranks[0] and self.saved_step != step:
                remove(directory)
        return directory

    def _seal(self, directory: Path, step: int) -> None:
        agreement = self._agree("seal")
        seal(directory, {**self._run, "step": step}, agreement=agreement)
        self.saved_step = step
        with agreement.phase("remove old ones"):
            if agreement.rank == agreement.ranks[0]:
                remove_unfinished(self._folder)
                remove_old(self._folder, keep=self._keep, step=step)
