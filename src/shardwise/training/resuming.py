"""Which checkpoint a training goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwise.errors import CheckpointError, ConfigurationError
from shardwise.materialization import Agreement
from shardwise.training.checkpoints import (
    newest_first,
    remove_unfinished,
    require_same_training,
    set_aside,
)
from shardwise.training.settings import RESUME_AUTO
from shardwise.transformers_model.sealed import find_fault, read_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a training goes on from.

    Args:
        directory: Of the checkpoint.
        step: Of it.
        ranks: That wrote it.
    """

    directory: Path
    step: int
    ranks: int


def find_start(
    folder: Path,
    resume: str | None,
    *,
    identity: Mapping[str, Any],
    agree: Callable[[str], Agreement],
    note: Callable[[str], None],
) -> Start | None:
    """Return the checkpoint to go on from, looked through by all ranks; None to begin anew. All ranks call this together.

    Args:
        folder: Of the training's checkpoints; nothing in it is changed.
        resume: As in the settings.
        identity: What the training is.
        agree: Makes the agreement of a call.
        note: Told what was refused, and that there was nothing.

    Raises:
        ConfigurationError: The checkpoint is of another training; or there is one, and `resume` is None.
        CheckpointError: The one that `resume` names is not whole, or none is; or one could not be looked at.
        PeerError: As above, on the ranks that have not looked.
    """
    agreement = agree("resume")
    with agreement.phase("list"):
        found = None
        if agreement.rank == agreement.ranks[0]:
            folder.mkdir(parents=True, exist_ok=True)
            found = json.dumps([str(path) for path in newest_first(folder)])
        present = [Path(name) for name in json.loads(agreement.publish("present", found))]
        if resume is None:
            refuse_checkpoints(folder, present)
    if resume is None:
        return None
    faults: list[str] = []
    for directory in present if resume == RESUME_AUTO else [Path(resume).absolute()]:
        agreement = agree("resume")
        fault = find_fault(directory, agreement=agreement)
        if fault is None:
            with agreement.phase("compare"):
                run = read_run(directory)
                require_same_training(run, identity, directory)
                return Start(directory=directory, step=int(run["step"]), ranks=int(run["ranks"]))
        if resume != RESUME_AUTO:
            raise CheckpointError(
                f"--resume {resume}: expected a whole checkpoint: {fault}. --resume auto takes the newest whole one."
            )
        faults.append(fault)
        if directory != present[-1]:
            note(f"{directory.name} is refused: {fault}. Going on from the one before it.")
    if faults:
        raise CheckpointError(
            f"--resume auto: expected a whole checkpoint in {folder}, got none: {'; '.join(faults)}. Name another one with --resume, "
            "or remove these to begin anew."
        )
    note(f"no checkpoint in {folder}: beginning at the first step")
    return None


def refuse_checkpoints(folder: Path, present: Sequence[Path]) -> None:
    """Raise if a training that begins would find checkpoints of another one.

    Args:
        folder: Of its checkpoints.
        present: Those in it, the newest first.

    Raises:
        ConfigurationError: There are some.
    """
    if present:
        raise ConfigurationError(
            f"{folder}: expected no checkpoints, got {present[0].name}. Give --resume auto to go on from the newest, or another "
            "--output-dir, or remove that directory: a checkpoint is never overwritten."
        )


def make_way(folder: Path, *, start: Start | None, agreement: Agreement, note: Callable[[str], None]) -> None:
    """Remove what was left unfinished, and set aside checkpoints of steps that are taken anew. All ranks call this together.

    Args:
        folder: Of the training's checkpoints.
        start: What the training goes on from; None where it begins, and there are no checkpoints.
        agreement: Of the call.
        note: Told what was set aside.
    """
    with agreement.phase("make way"):
        names = None
        if agreement.rank == agreement.ranks[0]:
            remove_unfinished(folder)
            aside = [] if start is None else set_aside(folder, start=start.directory, step=start.step)
            names = json.dumps([path.name for path in aside])
        found = json.loads(agreement.publish("aside", names))
    if start is not None and found:
        note(
            f"Going on from step {start.step}, other checkpoints from there on are set aside as {', '.join(found)}: remove what you "
            "do not need."
        )
