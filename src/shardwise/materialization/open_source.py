"""Open a checkpoint on all ranks: one rank parses its headers, the others get what it found."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from shardwise.checkpoint import (
    PICKLE_ENDINGS,
    HubAccess,
    Location,
    Run,
    SafetensorsSource,
    Source,
    StateDictSource,
    StoredTensor,
    cached_snapshot,
    load_pickle,
    locate,
    read_text,
    snapshot_revision,
)
from shardwise.errors import CheckpointError, ConfigurationError, StalledReadError
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.awaited_call import Doing, on_thread
from shardwise.materialization.collector import resting_collector
from shardwise.materialization.comparable import Comparable
from shardwise.materialization.comparing import comparable_lines
from shardwise.materialization.downloading import download
from shardwise.materialization.packed_text import packed, unpacked
from shardwise.profiling import own_node, phase
from shardwise.tensors import dtype_name

Checkpoint = str | os.PathLike[str] | Mapping[str, torch.Tensor] | Source
_PICKLE = "a pickle file"
_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")
_MOST_CONFIG_BYTES = 16 * 2**20


class RemoteSource:
    """What a rank knows of a source that others alone can read: everything but the values.

    Args:
        name: What messages call it.
        tensors: As a rank that reads it described them.
        in_memory: Whether it is memory of that rank rather than files.
    """

    def __init__(self, name: str, tensors: Mapping[str, StoredTensor], *, in_memory: bool) -> None:
        self.name = name
        self.tensors = tensors
        self.in_memory = in_memory

    def read_into(self, file: str, offset: int, into: memoryview) -> None:
        """Raise: the values are elsewhere."""
        raise CheckpointError(
            f"{self.name}, {file}: expected a rank that can read it, got a read on a rank that does not see it."
        )

    def mapped(self, runs: Sequence[Run]) -> list[torch.Tensor | None]:
        """Nothing: the values are elsewhere."""
        return [None] * len(runs)

    def require_unchanged(self) -> None:
        """Nothing to compare with."""

    def close(self) -> None:
        """Nothing to close."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A source and, of one on disk, the directory that its config lies in."""

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
    configs_into: Path | None = None,
) -> Opened:
    """Open a checkpoint. All ranks of the call do this together.

    Args:
        checkpoint: Directory, file, hub id, state dict, or a source. Of a state dict, and of a pickle file, only the
            values on the first rank that has them count.
        agreement: Of the call.
        revision: Of a hub id.
        subfolder: Of a directory or hub id.
        access: How a hub is reached.
        direct_io: Whether files are read past the page cache, where the file system can.
        configs_into: Empty directory of this rank; where it does not see the checkpoint, its small configuration files are
            written there. None: nothing but tensors is wanted.

    Returns:
        The source, a `StateDictSource` where the first rank alone holds the values, a `RemoteSource` where this rank cannot
        read it; and the directory of its configuration.

    Raises:
        CheckpointError: It cannot be read.
        PeerError: Another rank failed.
    """
    is_first = agreement.rank == agreement.ranks[0]
    if isinstance(checkpoint, Mapping):
        source = _of_reader(checkpoint if is_first else None, agreement, name="state dict of the first rank")
        return Opened(source=source, path=Path())
    if not isinstance(checkpoint, (str, os.PathLike)):
        if not isinstance(getattr(checkpoint, "tensors", None), Mapping):
            raise ConfigurationError(
                f"checkpoint: expected a directory, a file, a hub id, a state dict or a source, got "
                f"{type(checkpoint).__name__}"
            )
        return Opened(source=checkpoint, path=Path())
    place = _found_by_ranks(checkpoint, agreement, revision=revision, subfolder=subfolder, access=access)
    path, is_reader = place.path, place.reader == agreement.rank
    directory = path
    if path is not None:
        path = path / subfolder
        directory = path if path.is_dir() else path.parent
    if place.some_are_blind and configs_into is not None:
        with agreement.phase("configuration"):
            own = None
            if is_reader and directory is not None:
                folder: Path = directory
                own = on_thread(
                    lambda _: _configs_of(folder),
                    agreement,
                    what=f"{place.name}: reading its configuration",
                )
            text = agreement.publish("configuration", own)
            if directory is None:
                directory = configs_into
                for name, content in json.loads(text).items():
                    (directory / name).write_text(content, encoding="utf-8")
    if place.is_pickle:
        with agreement.phase("read pickle"):
            tensors = None
            if is_reader and path is not None:
                tensors = on_thread(
                    lambda _: load_pickle(path), agreement, what=f"{place.name}: reading a pickle file"
                )
        source = _of_reader(tensors, agreement, name=place.name)
    else:
        source = _safetensors(place, path, agreement, direct_io=direct_io)
    return Opened(source=source, path=directory if directory is not None else Path())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a checkpoint on disk is.

    Args:
        name: Of the checkpoint, for messages.
        path: On this rank; None where it does not see it.
        reader: First rank that sees it.
        checks: Whether this rank is the first of its node that sees it, and not the reader.
        is_pickle: Whether it is a pickle file.
        some_are_blind: Whether there are ranks that do not see it.
    """

    name: str
    path: Path | None
    reader: int
    checks: bool
    is_pickle: bool
    some_are_blind: bool


def _found_by_ranks(
    checkpoint: str | os.PathLike[str],
    agreement: Agreement,
    *,
    revision: str | None,
    subfolder: str,
    access: HubAccess | None,
) -> _Place:
    """Find out which ranks see a checkpoint: a path that one of them has on disk counts for all."""
    with agreement.phase("locate") as located:
        failure: CheckpointError | None = None
        location = None
        try:
            location = on_thread(
                lambda _: locate(checkpoint, revision=revision, access=access),
                agreement,
                what=f"{os.fspath(checkpoint)}: looking for it",
            )
        except StalledReadError:
            raise  # a rank whose mount hangs is none that does not see the files
        except CheckpointError as error:
            failure = error
        own_path = location.path if location is not None else None
        own_format = _format(own_path / subfolder) if own_path is not None else ""
        seen = [own_node(), own_path is not None, own_format]
        found = [json.loads(text) for text in agreement.gather("located", json.dumps(seen))]
        sees = [rank for rank, (_, is_local, _) in zip(agreement.ranks, found, strict=True) if is_local]
        if not sees and failure is not None:
            raise failure
        formats = sorted({kind for _, is_local, kind in found if is_local})
        kind = formats[0] if sees else "on a hub"
        located.same = _comparable(os.fspath(checkpoint), own_format or kind)
    path = own_path
    if location is not None and not sees:
        path = _local_snapshot(location, agreement, subfolder=subfolder)
        sees = list(agreement.ranks)
    first_of_node: dict[str, int] = {}
    for rank, (node, _, _) in zip(agreement.ranks, found, strict=True):
        if rank in set(sees):
            first_of_node.setdefault(node, rank)
    return _Place(
        name=os.fspath(checkpoint),
        path=path,
        reader=sees[0],
        checks=agreement.rank in first_of_node.values() and agreement.rank != sees[0],
        is_pickle=_format(path / subfolder) == _PICKLE if path is not None else formats[0] == _PICKLE,
        some_are_blind=len(sees) < len(agreement.ranks),
    )


def _safetensors(place: _Place, path: Path | None, agreement: Agreement, *, direct_io: bool) -> Source:
    with agreement.phase("read headers"), resting_collector():
        source = None
        if agreement.rank == place.reader and path is not None:
            with phase("parse headers"):
                source = _parsed(place, path, agreement, direct_io=direct_io)
        text = agreement.publish(
            "headers", packed(source.describe(rank=agreement.rank)) if source is not None else None
        )
        if source is not None:
            return source
        if path is None:
            described = SafetensorsSource.from_description(unpacked(text), Path())
            return RemoteSource(described.name, described.tensors, in_memory=False)
        return _described(place, path, agreement, unpacked(text), direct_io=direct_io)


def _parsed(place: _Place, path: Path, agreement: Agreement, *, direct_io: bool) -> SafetensorsSource:
    def parse(doing: Doing) -> SafetensorsSource:
        return SafetensorsSource.open(
            path,
            name=place.name,
            direct_io=direct_io,
            announce=lambda file: doing.begin(f"{place.name}, {file}: reading its header"),
        )

    return on_thread(parse, agreement, what=f"{place.name}: looking for its files")


def _described(
    place: _Place, path: Path, agreement: Agreement, text: str, *, direct_io: bool
) -> SafetensorsSource:
    def describe(doing: Doing) -> SafetensorsSource:
        source = SafetensorsSource.from_description(text, path, direct_io=direct_io)
        if place.checks:
            source.require_as_described(
                announce=lambda file: doing.begin(f"{place.name}, {file}: reading its header")
            )
        return source

    return on_thread(describe, agreement, what=f"{place.name}: looking for its files")


def _configs_of(directory: Path) -> str:
    found = {}
    for name in _CONFIGS:
        if (directory / name).is_file():
            found[name] = read_text(directory / name, most_bytes=_MOST_CONFIG_BYTES, what="a configuration")
    return json.dumps(found)


def _of_reader(tensors: Mapping[str, torch.Tensor] | None, agreement: Agreement, *, name: str) -> Source:
    """Describe tensors that one rank holds to the others, which pass None."""
    with agreement.phase("describe state dict"):
        if tensors is not None:
            source = StateDictSource(tensors)
            described = [[t.name, dtype_name(t.dtype), t.shape] for t in source.tensors.values()]
            agreement.publish("state dict", packed(json.dumps(described)))
            return source
        stored = {}
        for of, dtype, shape in json.loads(unpacked(agreement.publish("state dict", None))):
            kind: torch.dtype = getattr(torch, dtype)
            nbytes = math.prod(shape) * kind.itemsize
            stored[of] = StoredTensor(name=of, shape=tuple(shape), dtype=kind, file=of, start=0, stop=nbytes)
        return RemoteSource(name, stored, in_memory=True)


def _local_snapshot(location: Location, agreement: Agreement, *, subfolder: str) -> Path:
    """Return where a hub's files are on this rank; one rank per file system downloads them while the others wait."""
    is_first = agreement.rank == agreement.ranks[0]
    with agreement.phase("download"):
        path = None
        if is_first:
            if not location.access.force_download:
                path = cached_snapshot(location, subfolder=subfolder)
            path = path or download(location, agreement, subfolder=subfolder)
        revision = agreement.publish("revision", snapshot_revision(path) if path is not None else None)
    # What the first rank has downloaded again is new to all that see its files.
    pinned = replace(location.at(revision), access=location.access.without_force())
    with agreement.phase("find download"):
        path = path or cached_snapshot(pinned, subfolder=subfolder)
    found = [
        json.loads(text) for text in agreement.gather("found", json.dumps([own_node(), path is not None]))
    ]
    without = [host for host, has in found if not has]
    with agreement.phase("download on other nodes"):
        if path is None:
            own = agreement.ranks.index(agreement.rank)
            host = found[own][0]
            if host in without and own == next(
                i for i, (name, has) in enumerate(found) if name == host and not has
            ):
                path = download(pinned, agreement, subfolder=subfolder)
    with agreement.phase("find download again") as again:
        path = (
            path
            or cached_snapshot(pinned, subfolder=subfolder)
            or download(pinned, agreement, subfolder=subfolder)
        )
        again.same = _comparable(location.name, _format(path / subfolder))
        return path


def _format(path: Path) -> str:
    return _PICKLE if path.name.endswith(PICKLE_ENDINGS) else "safetensors files"


def _comparable(name: str, kind: str) -> Comparable:
    return comparable_lines(
        f"what {name!r} is",
        (kind,),
        remedy=(
            "A relative path is looked up in each rank's working directory, and a path that a rank does not see may be "
            "taken for a hub id: pass an absolute path that every rank can read."
        ),
    )
