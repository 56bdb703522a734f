"""Snapshots of hub checkpoints on this machine. Who downloads is decided above, where ranks can talk."""

from __future__ import annotations

import glob
import importlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from shardwise.checkpoint.index_file import INDEX_NAME, read_index
from shardwise.checkpoint.locate import Location
from shardwise.errors import CheckpointError, ConfigurationError, MissingDependencyError

# Indexes and configs; and the code that a config may name, which transformers runs only where the user trusts it.
_DESCRIPTIONS = ("*.json", "*.py")
_WEIGHTS = "*.safetensors"
_CONFIG_NAME = "config.json"
_SINGLE_NAME = "model.safetensors"
_NUMBERED = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")


def cached_snapshot(location: Location, *, subfolder: str = "") -> Path | None:
    """Return where a complete snapshot lies on this machine; the network is not used.

    huggingface_hub returns a folder whatever is in it (before 2.0) or refuses one for files that no load needs (since), so
    that completeness is judged here: a config, and every file of the index.

    ModelScope before 1.40 keeps one revision per model and cannot say which: with a revision the answer is None then, and
    `download_snapshot` compares with the hub.

    Args:
        location: On a hub.
        subfolder: Of the repository, in which config and weights lie.

    Returns:
        The snapshot's directory, without the subfolder; None where files are missing.

    Raises:
        DamagedFileError: The cached index is not one.
        MissingDependencyError: An `ms://` name without modelscope.
    """
    if location.kind == "modelscope":
        # First, so that a missing extra is not taken for a missing snapshot.
        path = _modelscope_cached(_modelscope(), location)
    else:
        path = _hub_cached(location)
    if path is None:
        return None
    folder = path / subfolder
    return path if (folder / _CONFIG_NAME).is_file() and not _missing(folder) else None


def download_snapshot(location: Location, *, subfolder: str = "") -> Path:
    """Download what is missing of a snapshot and return where it lies.

    Descriptions come first; then the files that the index names, or every safetensors file where there is no index. Weights
    in other formats, and the same weights under other names beside an index, stay on the hub.

    Args:
        location: On a hub.
        subfolder: Of the repository, in which config and weights lie.

    Returns:
        The snapshot's directory, without the subfolder.

    Raises:
        CheckpointError: The hub cannot be reached, has no such model, does not give it, or has no safetensors files of it; or
            the user wants files of this machine only.
        ConfigurationError: The hub's library does not take an argument.
        MissingDependencyError: An `ms://` name without modelscope.
    """
    if location.access.local_files_only:
        where = location.access.cache_dir or "the hub's cache"
        raise CheckpointError(
            f"{location.name}: local_files_only=True: expected a complete snapshot in {where}, got none, or one that lacks files. "
            "Check cache_dir and revision, or download the model first (hf download)."
        )
    path = _fetch(location, _DESCRIPTIONS)
    pinned = location.at(snapshot_revision(path))
    path = _fetch(pinned, (*_DESCRIPTIONS, *_weight_patterns(path, subfolder)))
    missing = _missing(path / subfolder)
    # Weights in a folder that was not named are the caller's to find.
    if missing and not (missing == [_SINGLE_NAME] and not subfolder and any(path.rglob(_WEIGHTS))):
        raise CheckpointError(
            f"{location.name}: expected safetensors files in {path / subfolder}, got none of {', '.join(missing[:3])} "
            f"({len(missing)} missing). If the network failed, try again; if the model has only pickle files, use "
            "load_pretrained(defer=False), or download pytorch_model.bin and pass its path."
        )
    return path


def fetch_descriptions(location: Location) -> None:
    """Download a model's indexes and configs, if it is not on this machine; `download_snapshot` begins with them too.

    Args:
        location: On a hub.

    Raises:
        CheckpointError: As `download_snapshot`.
        ConfigurationError: As `download_snapshot`.
        MissingDependencyError: As `download_snapshot`.
    """
    if cached_snapshot(location) is None:
        _fetch(location, _DESCRIPTIONS)


def downloaded_bytes(location: Location) -> int:
    """Return how many bytes lie in the hub's cache of a model, those of unfinished downloads among them.

    Where the cache of another hub is, its library alone knows: of ModelScope nothing is counted.
    """
    if location.kind != "hub":
        return 0
    folder = Path(location.access.cache_dir or constants.HF_HUB_CACHE)
    blobs = folder / f"models--{location.repo_id.replace('/', '--')}" / "blobs"
    nbytes = 0
    with suppress(OSError), os.scandir(blobs) as entries:  # it is not there yet, or files come and go
        for entry in entries:
            nbytes += entry.stat().st_size
    return nbytes


def snapshot_revision(path: Path) -> str:
    """Return the commit of a snapshot in the hub's cache, by the name of its directory.

    Every rank passes it to `Location.at`, so that a push to the hub meanwhile does not give ranks different files.

    Returns:
        The commit, or with ModelScope the branch; empty where the directory does not say, as in ModelScope's cache before
        1.40.
    """
    return path.name if path.parent.name == "snapshots" else ""


def _hub_cached(location: Location) -> Path | None:
    try:
        return Path(
            snapshot_download(
                location.repo_id,
                revision=location.revision,
                local_files_only=True,
                allow_patterns=[*_DESCRIPTIONS, _WEIGHTS],
                **location.access.in_cache(),
            )
        )
    except OSError as error:
        # It refuses a folder that lacks any file with these endings, and says where the folder is.
        partial = getattr(error, "snapshot_path", None)
        return Path(partial) if partial is not None else None


def _modelscope_cached(modelscope: Any, location: Location) -> Path | None:
    try:
        path = Path(
            modelscope.snapshot_download(
                location.repo_id,
                revision=location.revision,
                local_files_only=True,
                **location.access.in_cache(),
            )
        )
    except Exception:  # its errors share no base
        return None
    # A cache of one folder per model has whatever was downloaded last in it.
    return path if location.revision in (None, snapshot_revision(path)) else None


def _fetch(location: Location, patterns: Sequence[str]) -> Path:
    if location.kind == "modelscope":
        modelscope = _modelscope()
        _refuse_hub_arguments(location)
        try:
            return Path(
                modelscope.snapshot_download(
                    location.repo_id,
                    revision=location.revision,
                    allow_patterns=list(patterns),
                    **location.access.in_cache(),
                )
            )
        except Exception as error:  # its errors share no base
            raise CheckpointError(
                f"{location.name}: expected a model on ModelScope, got none: {_first_line(error)} Check the name, the revision, "
                "the network, and your access (modelscope login)."
            ) from error
    access = location.access.for_download(snapshot_download)
    try:
        return Path(
            snapshot_download(
                location.repo_id, revision=location.revision, allow_patterns=list(patterns), **access
            )
        )
    except (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    ) as error:
        # The message says it all; what the HTTP client went through does not help.
        raise _explained(location, error) from None
    except Exception as error:  # of requests, httpx or httpx2, as the version has it; they share no base
        raise _explained(location, error) from error


def _refuse_hub_arguments(location: Location) -> None:
    access = location.access
    given = {"token": access.token, "force_download": access.force_download, "proxies": access.proxies}
    refused = [name for name, value in given.items() if value]
    if refused:
        raise ConfigurationError(
            f"{location.name}: {', '.join(refused)}: expected a model on the Hugging Face hub, got one on ModelScope. Leave them "
            "out: modelscope login keeps a token, and the environment's HTTPS_PROXY a proxy."
        )


def _explained(location: Location, error: Exception) -> CheckpointError:
    got = "got neither"
    if isinstance(error, GatedRepoError):
        got = "got a gated one"
        remedy = "Accept its terms on its page, then log in (hf auth login, or HF_TOKEN)."
    elif isinstance(error, RepositoryNotFoundError):
        remedy = "Check the name; for a private model, log in (hf auth login, or HF_TOKEN)."
    elif isinstance(error, RevisionNotFoundError):
        got = f"got one without a revision {location.revision!r}"
        remedy = "Check the revision: a branch, a tag or a commit."
    elif constants.HF_HUB_OFFLINE:
        remedy = (
            f"HF_HUB_OFFLINE is set: download the model where there is a network (hf download {location.repo_id}), or "
            "unset it."
        )
    else:
        remedy = "Check the name, the network (HF_ENDPOINT), the disk (HF_HUB_CACHE) and your access (hf auth login)."
    return CheckpointError(
        f"{location.name}: expected a directory or file, or a model on the hub, {got}: {_first_line(error)} {remedy}"
    )


def _weight_patterns(path: Path, subfolder: str) -> list[str]:
    prefix = f"{glob.escape(subfolder)}/" if subfolder else ""
    index = path / subfolder / INDEX_NAME
    if not index.is_file():
        return [prefix + _WEIGHTS]
    return [prefix + glob.escape(name) for name in sorted(set(read_index(index).values()))]


def _missing(folder: Path) -> list[str]:
    """Return the names of weight files that a snapshot lacks; a link without its blob counts as lacking."""
    if (folder / INDEX_NAME).is_file():
        expected = set(read_index(folder / INDEX_NAME).values())
        return sorted(name for name in expected if not (folder / name).is_file())
    found = {item.name for item in folder.glob(_WEIGHTS) if item.is_file()}
    if _SINGLE_NAME in found:
        return []
    # Numbered files say how many there are, also while their index is not here yet.
    groups = {(m["stem"], m["count"]) for m in map(_NUMBERED.fullmatch, found) if m is not None}
    for stem, count in sorted(groups):
        numbered = {f"{stem}-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)}
        if not numbered <= found:
            return sorted(numbered - found)
    return [] if found else [_SINGLE_NAME]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0].strip().removeprefix("Got: ") if lines else type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _modelscope() -> Any:
    try:
        return importlib.import_module("modelscope")
    except ImportError as error:
        raise MissingDependencyError(
            "an ms:// checkpoint needs modelscope. Install it with: pip install 'shardwise[modelscope]'"
        ) from error
