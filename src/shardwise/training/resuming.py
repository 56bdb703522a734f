"""Which checkpoint a training goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardwise.errors import CheckpointError, ConfigurationError
from shardwise.materialization import Agreement
from shardwise.training.checkpoints import newest_first, remove_old, require_same_training
from shardwise.training.settings import RESUME_AUTO
from shardwise.transformers_model.sealed import find_fault, read_run


def find_start(
    folder: Path,
    resume: str | None,
    *,
    identity: Mapping[str, Any],
    agree: Callable[[str], Agreement],
    note: Callable[[str], None],
) -> Path | None:
    """Return the checkpoint to go on from, looked through by all ranks; None to begin anew. All ranks call this together.

    Args:
        folder: Of the training's checkpoints; what was left unfinished in it is removed.
        resume: As in the settings.
        identity: What the training is.
        agree: Makes the agreement of a call.
        note: Told what was refused.

    Raises:
        ConfigurationError: The checkpoint is of another training; or there is one, and `resume` is None.
        CheckpointError: The one that `resume` names is not whole.
    """
    agreement = agree("resume")
    with agreement.phase("list"):
        found = None
        if agreement.rank == agreement.ranks[0]:
            folder.mkdir(parents=True, exist_ok=True)
            remove_old(folder, keep=None)
            found = json.dumps([str(path) for path in newest_first(folder)])
        present = [Path(name) for name in json.loads(agreement.publish("present", found))]
        if resume is None and present:
            raise ConfigurationError(
                f"{folder}: expected no checkpoints, got {present[0].name}. Give --resume auto to go on from the newest, or another "
                "--output-dir."
            )
    if resume is None:
        return None
    for directory in present if resume == RESUME_AUTO else [Path(resume).absolute()]:
        fault = find_fault(directory, agreement=agree("resume"))
        if fault is None:
            require_same_training(read_run(directory), identity, directory)
            return directory
        if resume != RESUME_AUTO:
            raise CheckpointError(
                f"--resume {resume}: expected a whole checkpoint: {fault}. --resume auto takes the newest whole one."
            )
        note(f"{directory.name} is refused: {fault}. Going on from the one before it.")
    if present:
        note("No checkpoint is whole: beginning anew.")
    return None
