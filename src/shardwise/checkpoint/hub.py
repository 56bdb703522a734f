"""Snapshots of hub checkpoints on this machine. Who downloads is decided above, where ranks can talk."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from shardwise.checkpoint.index_file import INDEX_NAME, read_index
from shardwise.checkpoint.locate import Location
from shardwise.errors import CheckpointError, MissingDependencyError

# Weights, their index, configs, tokenizers: not the same weights in other formats.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]


def cached_snapshot(location: Location) -> Path | None:
    """Return where a complete snapshot lies on this machine, or None; nothing is downloaded."""
    if location.kind == "modelscope":
        return None  # its own cache answers without the network in download_snapshot
    try:
        path = Path(
            snapshot_download(
                location.repo_id, revision=location.revision, local_files_only=True, allow_patterns=_WANTED
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        return None
    return path if _is_complete(path) else None


def download_snapshot(location: Location) -> Path:
    """Download what is missing of a snapshot and return where it lies.

    Raises:
        CheckpointError: The hub cannot be reached, has no such model, or does not give it.
        MissingDependencyError: An `ms://` name without modelscope.
    """
    if location.kind == "modelscope":
        return Path(_modelscope().snapshot_download(location.repo_id, revision=location.revision))
    try:
        return Path(snapshot_download(location.repo_id, revision=location.revision, allow_patterns=_WANTED))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{location.name}: expected a directory or file, or a model on the hub, got neither: {first_line} Check the name, the "
            "network (HF_HUB_OFFLINE, HF_ENDPOINT) and your access (hf auth login)."
        ) from error


def snapshot_revision(path: Path) -> str:
    """Return the commit of a snapshot in the hub's cache, by the name of its directory."""
    return path.name


def _is_complete(path: Path) -> bool:
    if (path / INDEX_NAME).is_file():
        return all((path / name).is_file() for name in set(read_index(path / INDEX_NAME).values()))
    return any(path.glob("*.safetensors"))


def _modelscope() -> Any:
    try:
        return importlib.import_module("modelscope")
    except ImportError as error:
        raise MissingDependencyError(
            "an ms:// checkpoint needs modelscope. Install it with: pip install 'shardwise[modelscope]'"
        ) from error
