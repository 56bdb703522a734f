"""A directory of prepared files: whole or not there, checked before use, safe for several processes at once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from shardwise.compare.announce import Progress
from shardwise.errors import CommandError

_MANIFEST: Final = "manifest.json"
_SCHEMA: Final = "shardwise.cache/1"
_UNFINISHED_PREFIX: Final = ".unfinished-"
_LOCK_POLL_SECONDS: Final = 0.2


def cache_directory() -> Path:
    """Return where prepared files are kept; it need not exist.

    `SHARDWISE_CACHE` if it is set, else `shardwise` in `XDG_CACHE_HOME`, else `~/.cache/shardwise`.
    """
    if chosen := os.environ.get("SHARDWISE_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "shardwise"
    return Path.home() / ".cache" / "shardwise"


def prepared_directory(name: str, *, build: Callable[[Path], None], progress: Progress) -> Path:
    """Return a directory of the cache, built first where it is missing or damaged.

    Args:
        name: Path of the directory inside the cache; it stands for one content only.
        build: Fills the empty directory that it is given, or raises.
        progress: Told what goes on.

    Returns:
        The directory, whose every file has the size and hash that it was built with.

    Raises:
        CommandError: The cache directory cannot be written.
    """
    final = cache_directory() / name
    root, name = final.parent, final.name
    if _is_intact(final):
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{name}.lock", progress=progress):
            if _is_intact(final):  # another process built it while this one waited
                return final
            if final.exists():
                progress(f"{final} is damaged, and is built again")
            # The lock is held: what is unfinished under this name was left by a process that is gone.
            for left in root.glob(f"{_UNFINISHED_PREFIX}{name}-*"):
                shutil.rmtree(left, ignore_errors=True)
            unfinished = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED_PREFIX}{name}-", dir=root))
            try:
                build(unfinished)
                _write_manifest(unfinished)
                if final.exists():
                    # A directory that is not empty cannot be replaced in one step.
                    os.replace(final, Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED_PREFIX}{name}-", dir=root)))
                os.replace(unfinished, final)
            finally:
                for left in root.glob(f"{_UNFINISHED_PREFIX}{name}-*"):
                    shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise CommandError(
            f"cache directory {root}: {error}. Set SHARDWISE_CACHE to a directory that can be written and has "
            "about 1 GB free."
        ) from error
    return final


@contextmanager
def _lock(path: Path, *, progress: Progress) -> Iterator[None]:
    with path.open("w") as file:
        waits = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waits:
                    progress(f"waiting for another process that is building the same files ({path})")
                waits = True
                time.sleep(_LOCK_POLL_SECONDS)
        yield  # closing the file gives the lock back, also when the process dies


def _write_manifest(directory: Path) -> None:
    files = {path.name: _file_record(path) for path in sorted(directory.iterdir())}
    manifest = {"schema": _SCHEMA, "files": files}
    (directory / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _is_intact(directory: Path) -> bool:
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != _SCHEMA:
            return False
        files: dict[str, Any] = manifest["files"]
        # Sizes first: the cheap check finds what was cut short.
        if any((directory / name).stat().st_size != record["bytes"] for name, record in files.items()):
            return False
        return bool(files) and all(_file_record(directory / name) == record for name, record in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _file_record(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
