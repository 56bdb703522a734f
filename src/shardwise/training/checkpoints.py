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

_PREFIX: Final = "step-"


def directory_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return folder / f"{_PREFIX}{step:08d}"


def newest_first(folder: Path) -> list[Path]:
    """Return the directories of a training's checkpoints, whole or not, the newest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)), reverse=True)


def require_same_training(run: Mapping[str, Any], identity: Mapping[str, Any], directory: Path) -> None:
    """Raise if a checkpoint is of a training with other settings or data.

    Raises:
        ConfigurationError: Naming what differs.
    """
    stored = run.get("identity", {})
    differing = [
        f"{name} {stored.get(name)!r}, got {identity.get(name)!r}"
        for name in sorted({*identity, *stored})
        if stored.get(name) != identity.get(name)
    ]
    if differing:
        raise ConfigurationError(
            f"--resume {directory}: expected the settings and data of the training that wrote it: {'; '.join(differing)}. Give the "
            "same, or begin another training in another directory."
        )


def remove_old(folder: Path, *, keep: int | None) -> None:
    """Remove all but the newest whole checkpoints, and what was left unfinished. One rank calls this."""
    for leftover in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    whole = [path for path in newest_first(folder) if (path / RUN_NAME).is_file()]
    for path in whole[keep:] if keep is not None else []:
        remove(path)


def remove(directory: Path) -> None:
    """Remove a checkpoint, which at no moment looks like one then."""
    gone = directory.parent / f".{directory.name}.removed"
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(directory, gone)
    shutil.rmtree(gone, ignore_errors=True)
