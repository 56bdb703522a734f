"""Open a checkpoint on all ranks: one rank parses its headers, the others get what it found."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from shardwise.checkpoint import (
    HubAccess,
    Location,
    Run,
    SafetensorsSource,
    Source,
    StateDictSource,
    StoredTensor,
    cached_snapshot,
    download_snapshot,
    load_pickle,
    locate,
    snapshot_revision,
)
from shardwise.errors import CheckpointError, ConfigurationError
from shardwise.materialization.agreement import Agreement, Comparable
from shardwise.materialization.collector import resting_collector
from shardwise.materialization.comparing import comparable_lines
from shardwise.materialization.packed_text import packed, unpacked
from shardwise.profiling import phase
from shardwise.tensors import dtype_name

Checkpoint = str | os.PathLike[str] | Mapping[str, torch.Tensor] | Source
PICKLE_ENDINGS = (".bin", ".bin.index.json")


class RemoteSource:
    """What ranks without values know of a state dict that the first rank holds: everything but the values.

    Args:
        tensors: As the first rank described them.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.name = "state dict of the first rank"
        self.tensors = tensors

    def read_into(self, file: str, offset: int, into: memoryview) -> None:
        """Raise: the values are elsewhere."""
        raise CheckpointError(f"{file}: expected the first rank to read it, got a read on another rank.")

    def mapped(self, runs: Sequence[Run]) -> list[torch.Tensor | None]:
        """Nothing: the values are elsewhere."""
        return [None] * len(runs)

    def require_unchanged(self) -> None:
        """Nothing to compare with."""

    def close(self) -> None:
        """Nothing to close."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A source and, of one on disk, the directory that it lies in."""

    source: Source
    path: Path


def open_source(
    checkpoint: Checkpoint,
    *,
    agreement: Agreement,
    revision: str | None = None,
    subfolder: str = "",
    access: HubAccess | None = None,
    direct_io: bool = False,
) -> Opened:
    """Open a checkpoint. All ranks of the call do this together.

    Args:
        checkpoint: Directory, file, hub id, state dict, or a source. Of a state dict, and of a pickle file, only the
            values on the first rank count.
        agreement: Of the call.
        revision: Of a hub id.
        subfolder: Of a directory or hub id.
        access: How a hub is reached.
        direct_io: Whether files are read past the page cache, where the file system can.

    Returns:
        The source, a `StateDictSource` where the first rank alone holds the values; and its directory.

    Raises:
        CheckpointError: It cannot be read.
        PeerError: Another rank failed.
    """
    is_first = agreement.rank == agreement.ranks[0]
    if isinstance(checkpoint, Mapping):
        return Opened(source=_of_first_rank(checkpoint if is_first else None, agreement), path=Path())
    if not isinstance(checkpoint, (str, os.PathLike)):
        if not isinstance(getattr(checkpoint, "tensors", None), Mapping):
            raise ConfigurationError(
                f"checkpoint: expected a directory, a file, a hub id, a state dict or a source, got "
                f"{type(checkpoint).__name__}"
            )
        return Opened(source=checkpoint, path=Path())
    with agreement.phase("locate") as located:
        location = locate(checkpoint, revision=revision, access=access)
        kind = location.kind if location.path is None else _format(location.path / subfolder)
        located.same = _comparable(location.name, kind)
    path = (
        location.path
        if location.path is not None
        else _local_snapshot(location, agreement, subfolder=subfolder)
    )
    path = path / subfolder
    directory = path if path.is_dir() else path.parent
    if path.name.endswith(PICKLE_ENDINGS):
        with agreement.phase("read pickle"):
            tensors = load_pickle(path) if is_first else None
        return Opened(source=_of_first_rank(tensors, agreement), path=directory)
    with agreement.phase("read headers"):
        source = None
        if is_first:
            with phase("parse headers"), resting_collector():
                source = SafetensorsSource.open(path, name=location.name, direct_io=direct_io)
        text = agreement.publish("headers", packed(source.describe()) if source is not None else None)
        if source is None:
            source = SafetensorsSource.from_description(unpacked(text), path, direct_io=direct_io)
    return Opened(source=source, path=directory)


def _of_first_rank(tensors: Mapping[str, torch.Tensor] | None, agreement: Agreement) -> Source:
    with agreement.phase("describe state dict"):
        if tensors is not None:
            source = StateDictSource(tensors)
            described = [[t.name, dtype_name(t.dtype), t.shape] for t in source.tensors.values()]
            agreement.publish("state dict", packed(json.dumps(described)))
            return source
        stored = {}
        for name, dtype, shape in json.loads(unpacked(agreement.publish("state dict", None))):
            kind: torch.dtype = getattr(torch, dtype)
            nbytes = math.prod(shape) * kind.itemsize
            stored[name] = StoredTensor(
                name=name, shape=tuple(shape), dtype=kind, file=name, start=0, stop=nbytes
            )
        return RemoteSource(stored)


def _local_snapshot(location: Location, agreement: Agreement, *, subfolder: str) -> Path:
    """Return where a hub's files are on this rank; one rank per file system downloads them while the others wait."""
    is_first = agreement.rank == agreement.ranks[0]
    with agreement.phase("download"):
        path = None
        if is_first:
            if not location.access.force_download:
                path = cached_snapshot(location, subfolder=subfolder)
            path = path or download_snapshot(location, subfolder=subfolder)
        revision = agreement.publish("revision", snapshot_revision(path) if path is not None else None)
    # What the first rank has downloaded again is new to all that see its files.
    pinned = replace(location.at(revision), access=location.access.without_force())
    with agreement.phase("find download"):
        path = path or cached_snapshot(pinned, subfolder=subfolder)
    found = [
        json.loads(text)
        for text in agreement.gather("found", json.dumps([socket.gethostname(), path is not None]))
    ]
    without = [host for host, has in found if not has]
    with agreement.phase("download on other nodes"):
        if path is None:
            own = agreement.ranks.index(agreement.rank)
            host = found[own][0]
            if host in without and own == next(
                i for i, (name, has) in enumerate(found) if name == host and not has
            ):
                path = download_snapshot(pinned, subfolder=subfolder)
    with agreement.phase("find download again") as again:
        path = (
            path
            or cached_snapshot(pinned, subfolder=subfolder)
            or download_snapshot(pinned, subfolder=subfolder)
        )
        again.same = _comparable(location.name, _format(path / subfolder))
        return path


def _format(path: Path) -> str:
    return "a pickle file" if path.name.endswith(PICKLE_ENDINGS) else "safetensors files"


def _comparable(name: str, kind: str) -> Comparable:
    return comparable_lines(
        f"what {name!r} is",
        (kind,),
        remedy=(
            "A relative path is looked up in each rank's working directory, and a path that a rank does not see may be "
            "taken for a hub id: pass an absolute path that every rank can read."
        ),
    )
