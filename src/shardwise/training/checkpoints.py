"""A training's checkpoints: whole ones are found again, others are refused with what is wrong.

Each is a directory as `TransformersModel.save` writes it, with `run.json` beside its files: what the training is, and the size and
checksum of every file. It is written last, so a checkpoint without it is half-written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from shardwise.errors import ConfigurationError
from shardwise.transformers_model.sealed import RUN_NAME

CHECKPOINTS: Final = "checkpoints"
"""Name of their folder in a training's output directory."""
_PREFIX: Final = "step-"
_ASIDE: Final = ".abandoned"
DIGEST_NAME: Final = "data_digest"  # in what a training is


def directory_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return folder / f"{_PREFIX}{step:08d}"


def newest_first(folder: Path) -> list[Path]:
    """Return the directories of a training's checkpoints, whole or not, the newest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if _number_of(path).isdigit() and not path.suffix]
    return sorted(found, key=_step_of, reverse=True)


def newest_whole(folder: Path) -> Path | None:
    """Return the directory of a training's newest whole checkpoint; None where there is none."""
    return next((path for path in newest_first(folder) if (path / RUN_NAME).is_file()), None)


def require_same_training(run: Mapping[str, Any], identity: Mapping[str, Any], directory: Path) -> None:
    """Raise if a checkpoint is of a training with other settings or data.

    Raises:
        ConfigurationError: Naming what differs.
    """
    stored = run.get("identity", {})
    names = sorted(name for name in {*identity, *stored} if stored.get(name) != identity.get(name))
    differing = [
        "the same tokens of data"
        if name == DIGEST_NAME
        else f"{name} {stored.get(name)!r}, got {identity.get(name)!r}"
        for name in names
    ]
    if differing:
        raise ConfigurationError(
            f"--resume {directory}: expected the settings and data of the training that wrote it: {'; '.join(differing)}. Give the "
            "same, or begin another training in another directory."
        )


def set_aside(folder: Path, *, start: Path, step: int) -> list[Path]:
    """Rename the other checkpoints from a step on, so that none is gone on from; return where they are. One rank calls this.

    Args:
        folder: Of the training's checkpoints.
        start: The checkpoint that the training goes on from.
        step: Of it.
    """
    aside = []
    for path in newest_first(folder):
        if _step_of(path) >= step and not path.samefile(start):
            target = path.with_name(f"{path.name}{_ASIDE}")
            if target.exists() and target.samefile(start):
                target = target.with_name(f"{target.name}{_ASIDE}")
            remove(target)
            os.replace(path, target)
            aside.append(target)
    return aside


def remove_unfinished(folder: Path) -> None:
    """Remove what was left unfinished. One rank calls this, while no checkpoint is being written."""
    for leftover in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_old(folder: Path, *, keep: int | None, step: int) -> None:
    """Remove whole checkpoints but the newest, and what was set aside, of those up to a step. One rank calls this.

    Args:
        folder: Of the training's checkpoints.
        keep: How many are kept, at least one; None keeps all.
        step: Of the one that has just become whole, which is the newest of this training whatever else is there.
    """
    if keep is None:
        return
    whole = [path for path in newest_first(folder) if _step_of(path) <= step and (path / RUN_NAME).is_file()]
    numbered = [path for path in folder.glob(f"{_PREFIX}*{_ASIDE}") if _number_of(path).isdigit()]
    aside = [path for path in numbered if _step_of(path) <= step]
    for path in [*whole[keep:], *aside]:
        remove(path)


def remove(directory: Path) -> None:
    """Remove a checkpoint if it is there; at no moment does it look like one then."""
    if not directory.is_dir():
        return
    gone = directory.parent / f".{directory.name}.removed"
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(directory, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _step_of(directory: Path) -> int:
    return int(_number_of(directory))


def _number_of(directory: Path) -> str:
    return directory.name.partition(".")[0].removeprefix(_PREFIX)
