"""What a user's text for a checkpoint means: a directory, a file, or a name on a hub."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not re-exported by name

from shardwise.checkpoint.hub_access import HubAccess
from shardwise.errors import CheckpointError

MODELSCOPE_PREFIX = "ms://"
_MODELSCOPE_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# A hub accepts these in a name, but nobody means one by them.
_FILE_ENDINGS = (".safetensors", ".bin", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where a checkpoint is.

    Args:
        name: As given, for messages.
        kind: Of place.
        path: Of a directory or file; None on a hub.
        repo_id: On a hub, else empty.
        revision: On a hub; None is its default branch.
        access: How a hub is reached.
    """

    name: str
    kind: Literal["local", "hub", "modelscope"]
    path: Path | None
    repo_id: str
    revision: str | None
    access: HubAccess

    def at(self, revision: str) -> Location:
        """Return the same place at one commit.

        Args:
            revision: As `snapshot_revision` returned; empty where no commit is known, which changes nothing.
        """
        return replace(self, revision=revision or self.revision)


def locate(
    checkpoint: str | os.PathLike[str], *, revision: str | None = None, access: HubAccess | None = None
) -> Location:
    """Say where a checkpoint is; nothing is downloaded.

    What is on this machine wins over a hub's model of the same name.

    Args:
        checkpoint: Directory, file, hub id, or `ms://` and a ModelScope id. A path object is never a hub id.
        revision: Of a hub id.
        access: How a hub is reached; None is as its library does it by itself.

    Raises:
        CheckpointError: There is no such path, and the text cannot be a hub id.
    """
    name, access = os.fspath(checkpoint), access or HubAccess()
    if name.startswith(MODELSCOPE_PREFIX):
        repo_id = name.removeprefix(MODELSCOPE_PREFIX)
        if not _MODELSCOPE_ID.fullmatch(repo_id) or ".." in repo_id:
            raise CheckpointError(
                f"{name}: expected {MODELSCOPE_PREFIX}OWNER/NAME, got {repo_id!r} after the prefix. Copy the id from the "
                "model's page on ModelScope."
            )
        return Location(
            name=name, kind="modelscope", path=None, repo_id=repo_id, revision=revision, access=access
        )
    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why_not_local = getattr(error, "strerror", None) or str(error)
    else:
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise CheckpointError(
                f"{name}: expected a directory or a regular file, got another kind of file."
            )
        return Location(name=name, kind="local", path=Path(name), repo_id="", revision=None, access=access)
    why_not_hub = _why_not_hub(checkpoint, name)
    if why_not_hub is not None:
        raise CheckpointError(
            f"{name!r}: expected a directory, a file or a hub id, got a path that does not exist ({why_not_local}, seen from "
            f"{os.getcwd()}) and that cannot be a hub id ({why_not_hub}). Check the spelling; a hub id is NAME or OWNER/NAME."
        )
    return Location(name=name, kind="hub", path=None, repo_id=name, revision=revision, access=access)


def _why_not_hub(checkpoint: str | os.PathLike[str], name: str) -> str | None:
    if not isinstance(checkpoint, str):
        return "it is a path object; pass a hub id as text"
    if name.startswith("~"):
        return "it begins with ~, which a shell replaces and Python does not"
    if name.endswith(_FILE_ENDINGS):
        return "it ends like a file name"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error).strip().splitlines()[0].rstrip(".")
    return None
