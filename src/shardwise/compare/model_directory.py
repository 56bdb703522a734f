"""Where the model that the user names is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from shardwise.compare.announce import Progress
from shardwise.errors import CheckpointError, ConfigurationError

# No code and no pickles.
_WANTED: Final = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
_HUB_ID_PARTS: Final = 2


def model_directory(model: str, *, progress: Progress) -> Path:
    """Return the directory of a model: itself, or the hub's snapshot, downloaded once and not by every rank.

    Args:
        model: A directory or a hub id.
        progress: Told what goes on.

    Raises:
        ConfigurationError: It is neither.
        CheckpointError: The directory has no `config.json`, or the hub does not give the model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        directory = path
    elif (
        path.exists() or model.startswith((".", "/", "~")) or not 1 <= len(model.split("/")) <= _HUB_ID_PARTS
    ):
        raise ConfigurationError(
            f"model: expected a directory or a hub id, got {model!r}, which is neither. Check the path."
        )
    else:
        directory = _snapshot(model, progress=progress)
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory}: expected config.json in it. Give the directory of a pretrained model."
        )
    return directory.resolve()


def _snapshot(hub_id: str, *, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    progress(f"looking for {hub_id} on the hub")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id}: there is no such directory, and the hub did not give it: {reason} "
            "Check the name and the network, or give a directory."
        ) from error
