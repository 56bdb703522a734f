"""A training's state that is written from a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from shardwise.materialization import Agreement, make_group
from shardwise.transformers_model.resume import Training, give_name, prepare, removed_if_it_fails
from shardwise.transformers_model.sharded_files import begin_writing, end_writing


class PendingSave:
    """A training's state that is written while the training goes on; the directory is there after `finish`."""

    def __init__(
        self, training: Training, directory: Path, *, step: int, agree: Callable[[str], Agreement]
    ) -> None:
        agreement = agree("save_async")
        self._directory, self._agree = directory, agree
        with agreement.phase("prepare"):
            tensors, self._unfinished = prepare(training, directory, step=step, agreement=agreement)
        with agreement.phase("connect"):  # all ranks stand here: making a group waits for each
            # A group of its own: in the default one its thread's collectives would meet those of training.
            self._group = make_group(
                agreement.ranks,
                rank=agreement.rank,
                backend=str(dist.Backend.GLOO),
                name=agreement.numbered("save_async"),
                timeout=timedelta(seconds=agreement.timeout_seconds),
            )
        with self._left_if_it_fails(), agreement.phase("copy"):
            self._writing = begin_writing(tensors, self._unfinished, group=self._group)

    @property
    def is_done(self) -> bool:
        """Whether this rank has written its part, so that it need not wait in `finish` but for the others."""
        return self._writing.done()

    def finish(self) -> None:
        """Wait until every rank has written its part, and give the directory its name. All ranks call this together, once.

        Raises:
            CheckpointError: A file could not be written.
            PeerError: Another rank failed.
        """
        agreement = self._agree("PendingSave.finish")
        with removed_if_it_fails(self._unfinished, agreement):
            with self._left_if_it_fails(), agreement.phase("write"):
                end_writing(self._writing, self._unfinished, timeout_seconds=agreement.timeout_seconds)
            dist.destroy_process_group(self._group)  # after the phase: no rank needs it any more
            with agreement.phase("finish"):
                give_name(self._unfinished, self._directory, agreement=agreement)

    @contextmanager
    def _left_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._group.abort()  # the thread may still wait in it
            dist.destroy_process_group(self._group)
            raise
