"""What a user's text for a checkpoint means: a directory, a file, or a name on a hub."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from shardwise.errors import CheckpointError

MODELSCOPE_PREFIX = "ms://"


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where a checkpoint is.

    Args:
        name: As given.
        kind: Of place.
        path: Of a directory or file; None on a hub.
        repo_id: On a hub, else empty.
        revision: On a hub; None is its default branch.
    """

    name: str
    kind: Literal["local", "hub", "modelscope"]
    path: Path | None
    repo_id: str
    revision: str | None

    def at(self, revision: str) -> Location:
        """Return the same place at one commit."""
        return replace(self, revision=revision)


def locate(checkpoint: str | os.PathLike[str], *, revision: str | None = None) -> Location:
    """Say where a checkpoint is; nothing is downloaded.

    Args:
        checkpoint: Directory, file, hub id, or `ms://` and a ModelScope id.
        revision: Of a hub id.

    Raises:
        CheckpointError: There is no such path, and the text cannot be a hub id.
    """
    name = os.fspath(checkpoint)
    if name.startswith(MODELSCOPE_PREFIX):
        repo_id = name.removeprefix(MODELSCOPE_PREFIX)
        return Location(name=name, kind="modelscope", path=None, repo_id=repo_id, revision=revision)
    path = Path(name)
    if path.exists():
        return Location(name=name, kind="local", path=path, repo_id="", revision=None)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CheckpointError(
            f"{name}: expected a directory, a file or a hub id, got a path that does not exist and cannot be a hub id."
        ) from error
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith((".safetensors", ".bin")):
        raise CheckpointError(f"{name}: expected a directory or file, got a path that does not exist.")
    return Location(name=name, kind="hub", path=None, repo_id=name, revision=revision)
