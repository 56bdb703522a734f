"""What a saved training was when it was whole: the size and checksum of every file, recorded beside them.

The record is `run.json`. It is written last, so a checkpoint of a training without it is half-written.
"""

from __future__ import annotations

import json
import socket
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from shardwise.checkpoint import write_whole
from shardwise.errors import CheckpointError
from shardwise.materialization import Agreement

RUN_NAME: Final = "run.json"
_SCHEMA: Final = "shardwise.run/1"
_CHUNK_BYTES: Final = 1 << 22
_MISSING: Final = (FileNotFoundError, NotADirectoryError)


def seal(directory: Path, run: Mapping[str, Any], *, agreement: Agreement) -> None:
    """Write `run.json`, which makes a checkpoint a whole one. All ranks call this together.

    Args:
        directory: With all files of the checkpoint.
        run: What the training is and how far it has come.
        agreement: Of the call.
    """
    with agreement.phase("seal"):
        names = _names_in(directory)
        own = {name: _sum_of(directory / name, agreement) for name in _part(names, agreement)}
        sums: dict[str, list[int]] = {}
        for text in agreement.gather("sums", json.dumps(own)):
            sums |= json.loads(text)
        if agreement.rank == agreement.ranks[0]:
            document = {"schema": _SCHEMA, **run, "files": dict(sorted(sums.items()))}
            write_whole(directory / RUN_NAME, json.dumps(document, indent=2) + "\n")


def find_fault(directory: Path, *, agreement: Agreement) -> str | None:
    """Return what is wrong with a checkpoint, the same on all ranks; None of a whole one. All ranks call this together.

    Args:
        directory: To look at; the ranks share the reading.
        agreement: Of the call.

    Raises:
        CheckpointError: It could not be looked at, which says nothing about it.
        PeerError: As above, on another rank.
    """
    with agreement.phase("look"):
        try:
            fault = _own_fault(directory, agreement)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or directory}: could not be read on rank {agreement.rank} ({socket.gethostname()}): "
                f"{error.strerror or error}. The checkpoint may be whole: check the disk or the mount, and go on then."
            ) from error
        faults = agreement.gather("faults", fault or "")
    return next((each for each in faults if each), None)


def read_run(directory: Path) -> dict[str, Any]:
    """Return what `seal` wrote.

    Raises:
        CheckpointError: There is no such thing.
        OSError: It could not be read.
    """
    path = directory / RUN_NAME
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["schema"] != _SCHEMA:
            raise CheckpointError(
                f"{path}: expected {_SCHEMA}, got {run['schema']}: another release wrote it"
            )
        files = run["files"]
        if not all(Path(name).name == name and len(files[name]) == 2 for name in files):
            raise ValueError("names or sums of files are not what they should be")
    except _MISSING:
        fault = f"is half-written: it has no {RUN_NAME}" if directory.is_dir() else "is not there"
        raise CheckpointError(f"{directory} {fault}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected the record of a training: {error}") from error
    return dict(run)


def _names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_file() and path.name != RUN_NAME)


def _part(names: list[str], agreement: Agreement) -> list[str]:
    return names[agreement.ranks.index(agreement.rank) :: len(agreement.ranks)]


def _sum_of(path: Path, agreement: Agreement) -> list[int]:
    """Return size in bytes and CRC-32 of a file."""
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
            agreement.step()
    return [size, checksum]


def _own_fault(directory: Path, agreement: Agreement) -> str | None:
    """Return what is wrong with this rank's part of a checkpoint's files."""
    try:
        recorded: dict[str, list[int]] = read_run(directory)["files"]
    except CheckpointError as error:
        return str(error)
    for name in _part(sorted(recorded), agreement):
        if fault := _fault_of(directory / name, recorded[name], agreement):
            return fault
    return None


def _fault_of(path: Path, recorded: list[int], agreement: Agreement) -> str | None:
    try:
        found = _sum_of(path, agreement)
    except _MISSING as error:
        return f"{path}: {error.strerror}"
    if found[0] != recorded[0]:
        return f"{path}: expected {recorded[0]} bytes, got {found[0]}"
    return None if found == recorded else f"{path}: its contents are not those that were written"
