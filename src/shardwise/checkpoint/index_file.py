"""The index of a checkpoint that is split over several files, and paths that must stay inside its directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardwise.checkpoint.regular_file import read_text
from shardwise.errors import CheckpointError, DamagedFileError

INDEX_NAME = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 200_000_000


def read_index(path: Path) -> dict[str, str]:
    """Return the file name of each tensor.

    Args:
        path: Of the index.

    Raises:
        DamagedFileError: It is not an index.
        CheckpointError: It names a path that leads out of its directory.
    """
    text = read_text(path, most_bytes=_MAX_INDEX_BYTES, what="an index")
    try:
        document = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(
            f"{path}: expected an index in JSON, got {error}. Get the file again."
        ) from error
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedFileError(
            f"{path}: expected a weight_map from tensor names to file names, got {type(weight_map).__name__}. Get the file again."
        )
    for tensor, name in weight_map.items():
        check_file_name(name, what=f"{path}: tensor {tensor!r}")
    return weight_map


def check_file_name(name: Any, *, what: str) -> None:
    """Raise unless a name is that of a file in the directory or below it.

    Raises:
        CheckpointError: Naming it.
    """
    parts = name.split("/") if isinstance(name, str) else []
    safe = bool(parts) and all(part not in ("", ".", "..") for part in parts)
    if not safe or "\0" in name or "\\" in name or (len(name) > 1 and name[1] == ":"):
        raise CheckpointError(
            f"{what}: expected the name of a file inside the checkpoint's directory, got {name!r}. Do not use this "
            "checkpoint unless you know where it is from."
        )


def resolve_inside(directory: Path, name: str) -> Path:
    """Return the path of a file of a checkpoint; a link may not leave its directory.

    The links of a hub's cache lead from `snapshots/COMMIT` to `blobs` beside it and are its own.

    Args:
        directory: Of the checkpoint; itself it may be a link.
        name: Checked by `check_file_name`.

    Raises:
        CheckpointError: The file is not there, or a link leads elsewhere.
    """
    path = directory / name
    home = directory.resolve()
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: expected a file of the checkpoint, got none ({error}). Is the download complete, and do all ranks "
            "name the same directory?"
        ) from error
    blobs = next(
        (above.parent / "blobs" for above in (home, *home.parents) if above.name == "snapshots"), None
    )
    if not real.is_relative_to(home) and (blobs is None or not real.is_relative_to(blobs.resolve())):
        raise CheckpointError(
            f"{path}: expected a file inside {home}, got a link to {real}. Pass the directory in which the files really lie."
        )
    return real


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} twice")
        found[name] = value
    return found
