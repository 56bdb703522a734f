"""A safetensors file, or a directory of them, as a source of tensor bytes."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from shardwise.checkpoint.checkpoint_files import SINGLE_NAME, directory_of, files_of
from shardwise.checkpoint.index_file import INDEX_NAME, resolve_inside
from shardwise.checkpoint.page_cache import fetch_pages
from shardwise.checkpoint.quantisation import refuse_quantised
from shardwise.checkpoint.ranged_file import BounceBuffers, RangedFile
from shardwise.checkpoint.safetensors_header import LENGTH_BYTES, header_length, parse_header
from shardwise.checkpoint.source import Run
from shardwise.checkpoint.stitched_pages import stitched_pages
from shardwise.checkpoint.stored_tensor import StoredTensor
from shardwise.errors import ChangedFileError, CheckpointError, DamagedFileError
from shardwise.profiling import own_node
from shardwise.tensors import dtype_name

_BOUNCE_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedFile:
    """What one rank has found in a file, so that others recognise it.

    Args:
        size: In bytes.
        header_bytes: Length of the header, without the 8 bytes before it.
        header_sha256: Of the header.
        mtime_ns: Of the file, on the host that described it.
    """

    size: int
    header_bytes: int
    header_sha256: str
    mtime_ns: int


class SafetensorsSource:
    """Tensors of safetensors files. A file is opened when something of it is wanted, and compared with its description then.

    Args:
        name: What messages call it.
        directory: In which the files lie.
        tensors: By checkpoint name.
        files: Description by file name.
        host: That described them.
        described_as: Who has described them, and where they lie there, for messages.
        direct_io: Read past the page cache where the file system can.
    """

    def __init__(
        self,
        *,
        name: str,
        directory: Path,
        tensors: Mapping[str, StoredTensor],
        files: Mapping[str, DescribedFile],
        host: str,
        described_as: str,
        direct_io: bool,
    ) -> None:
        self._name = name
        self._directory = directory
        self._tensors = dict(tensors)
        self._files = dict(files)
        self._host = host
        self._described_as = described_as
        self._bounce = BounceBuffers(nbytes=_BOUNCE_BYTES) if direct_io else None
        self._open: dict[str, RangedFile] = {}
        self._opened: set[str] = set()
        self._retries = 0
        self._lock = threading.Lock()
        self._opening: dict[str, threading.Lock] = {}
        self._closed = 0  # times

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        name: str | None = None,
        direct_io: bool = False,
        announce: Callable[[str], None] | None = None,
    ) -> SafetensorsSource:
        """Parse the headers of a file, or of a directory's files.

        Args:
            path: A `.safetensors` file; an index; or a directory with an index, with `model.safetensors`, or with other
                safetensors files.
            name: What messages call it.
            direct_io: Read past the page cache where the file system can.
            announce: Told each file's name before it is opened.

        Raises:
            CheckpointError: A file is damaged, not there, outside of the directory, or of another format.
        """
        directory, names, index = files_of(path)
        if path.is_dir() or index is not None:
            refuse_quantised(directory)
        tensors: dict[str, StoredTensor] = {}
        files: dict[str, DescribedFile] = {}
        for file in names:
            if announce is not None:
                announce(file)
            described, found = _describe(resolve_inside(directory, file), file)
            files[file] = described
            for tensor in found:
                if tensor.name in tensors:
                    raise DamagedFileError(
                        f"{directory}: expected each tensor in one file, got {tensor.name} in {tensors[tensor.name].file} and "
                        f"{file}. Remove the file that does not belong there."
                    )
                tensors[tensor.name] = tensor
        for tensor_name, file in (index or {}).items():
            got = tensors.get(tensor_name)
            if got is None or got.file != file:
                where = "no file" if got is None else got.file
                raise DamagedFileError(
                    f"{directory / INDEX_NAME}: expected {tensor_name} in {file}, got it in {where}. The index belongs to other "
                    "files: get the checkpoint again."
                )
        if path.is_dir() and index is not None:
            _refuse_stray(directory, tensors, announce)
        return cls(
            name=name or str(path),
            directory=directory,
            tensors=tensors,
            files=files,
            host=own_node(),
            described_as=f"this rank has described in {directory}",
            direct_io=direct_io,
        )

    @classmethod
    def from_description(cls, text: str, path: Path, *, direct_io: bool = False) -> SafetensorsSource:
        """Make the source that another rank has described; no file is opened.

        Args:
            text: As `describe` returned.
            path: Directory, file or index on this rank.
            direct_io: Read past the page cache where the file system can.
        """
        document = json.loads(text)
        tensors = {
            name: StoredTensor(
                name=name,
                dtype=getattr(torch, dtype),
                shape=tuple(shape),
                file=document["files"][file][0],
                start=start,
                stop=stop,
            )
            for name, dtype, shape, file, start, stop in document["tensors"]
        }
        return cls(
            name=document["name"],
            directory=directory_of(path),
            tensors=tensors,
            files={name: DescribedFile(**described) for name, described in document["files"]},
            host=document["host"],
            described_as=document["described_as"],
            direct_io=direct_io,
        )

    def require_as_described(self, *, announce: Callable[[str], None]) -> None:
        """Open every file once and compare it with its description.

        Args:
            announce: Told each file's name before it is opened.

        Raises:
            CheckpointError: A file is not there, or another one.
        """
        for name in self._files:
            announce(name)
            self._file(name)
        self.close()
        self._opened.clear()

    def describe(self, *, rank: int) -> str:
        """Return names, places and digests as text for other ranks.

        Args:
            rank: This one, which other ranks name where their files are others.
        """
        number = {name: index for index, name in enumerate(self._files)}
        return json.dumps(
            {
                "name": self._name,
                "host": self._host,
                "described_as": f"rank {rank} on {self._host} has described in {self._directory.absolute()}",
                "files": [[name, asdict(described)] for name, described in self._files.items()],
                "tensors": [
                    [t.name, dtype_name(t.dtype), t.shape, number[t.file], t.start, t.stop]
                    for t in self._tensors.values()
                ],
            },
            separators=(",", ":"),
        )

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._name

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by checkpoint name."""
        return self._tensors

    @property
    def retries(self) -> int:
        """How many reads were tried again, since the source was made."""
        return self._retries + sum(opened.retries for opened in self._open.values())

    @property
    def opened_files(self) -> frozenset[str]:
        """The files that were opened so far to read tensors."""
        return frozenset(self._opened)

    def read_into(self, file: str, offset: int, into: memoryview) -> None:
        """Fill a buffer with the bytes of a file from an offset on; see `Source`."""
        self.read_scattered(file, offset, [into])

    def read_scattered(self, file: str, offset: int, parts: Sequence[memoryview]) -> None:
        """Fill buffers with bytes that follow each other in a file; see `shardwise.checkpoint.read_scattered`."""
        self._file(file).read_scattered(offset, parts)

    def mapped(self, runs: Sequence[Run]) -> list[torch.Tensor | None]:
        """Return private pages of files as flat tensors, one mapping for each file; see `Source`."""
        # Not one for each run: a process may have 65,530 mappings, and a mixture of experts has more tensors.
        of_file: dict[str, mmap.mmap | None] = {}
        found: list[torch.Tensor | None] = []
        for run in runs:
            opened = self._file(run.file)
            if run.numel == 0 or run.start % run.dtype.itemsize or run.stop > opened.identity.size:
                found.append(None)
                continue
            if run.file not in of_file:
                of_file[run.file] = opened.map()
            pages = of_file[run.file]
            found.append(
                None
                if pages is None
                else torch.frombuffer(pages, dtype=run.dtype, count=run.numel, offset=run.start)
            )
        return found

    def stitched(self, shards: Sequence[Sequence[Run]]) -> list[torch.Tensor | None]:
        """Return several runs of files as one flat tensor of private pages, for each shard; see `shardwise.checkpoint.stitched`."""
        found: list[torch.Tensor | None] = []
        for runs in shards:
            parts = [(self._file(run.file), run.start, run.stop - run.start) for run in runs]
            is_there = all(start + nbytes <= file.identity.size for file, start, nbytes in parts)
            found.append(stitched_pages(parts, runs[0].dtype) if is_there else None)
        return found

    def fetch_mapped(self, ranges: Sequence[tuple[str, int, int]]) -> None:
        """Begin to bring what is mapped into the page cache; see `shardwise.checkpoint.fetch_mapped`."""
        found = [(self._file(name).path, start, stop) for name, start, stop in ranges]
        fetch_pages(found, sharers=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def require_unchanged(self) -> None:
        """Raise unless every open file is still what it was; see `Source`."""
        for opened in list(self._open.values()):
            opened.require_unchanged()

    def close(self) -> None:
        """Close files; a later read opens them again. Does not wait for reads that are in progress: they fail."""
        with self._lock:
            self._closed += 1
            for opened in self._open.values():
                self._retries += opened.retries
                opened.close()
            self._open.clear()

    def _file(self, name: str) -> RangedFile:
        with self._lock:
            if name in self._open:
                return self._open[name]
            opening, closed = self._opening.setdefault(name, threading.Lock()), self._closed
        # Not under the lock that `close` takes: opening reads the header, and a mount that is gone may never answer.
        with opening:
            found = self._open.get(name)
            if found is not None:
                return found
            opened = RangedFile(resolve_inside(self._directory, name), bounce=self._bounce)
            try:
                self._require_described(name, opened)
                with self._lock:
                    if closed != self._closed:
                        raise CheckpointError(
                            f"{opened.path}: expected an open checkpoint, got one that was closed meanwhile."
                        )
                    self._open[name] = opened
                    self._opened.add(name)
            except BaseException:
                opened.close()
                raise
            return opened

    def _require_described(self, name: str, opened: RangedFile) -> None:
        expected = self._files[name]
        got, _ = _fingerprint(opened)
        if got.size != expected.size:
            differs = f"one of {got.size:,} bytes in place of {expected.size:,}"
        elif (got.header_bytes, got.header_sha256) != (expected.header_bytes, expected.header_sha256):
            differs = "one whose header is another: other tensors, other places in it, or other metadata"
        elif got.mtime_ns != expected.mtime_ns and self._host == own_node():
            differs = "one of the same size that was written at another time"
        else:
            return
        raise ChangedFileError(
            f"{opened.path.absolute()}: expected the file {name} that {self._described_as}, got {differs}. Every rank must see "
            "the same files, and they must not change during a load."
        )


def _fingerprint(opened: RangedFile) -> tuple[DescribedFile, bytes]:
    """Return the description of a file, and its header."""
    size = opened.identity.size
    start = bytearray(min(LENGTH_BYTES, size))
    opened.read_into(0, memoryview(start))
    length = header_length(bytes(start), file=str(opened.path), file_bytes=size)
    header = bytearray(length)
    opened.read_into(LENGTH_BYTES, memoryview(header))
    described = DescribedFile(
        size=size,
        header_bytes=length,
        header_sha256=hashlib.sha256(header).hexdigest(),
        mtime_ns=opened.identity.mtime_ns,
    )
    return described, bytes(header)


def _describe(path: Path, name: str) -> tuple[DescribedFile, tuple[StoredTensor, ...]]:
    opened = RangedFile(path, bounce=None)
    try:
        described, header = _fingerprint(opened)
        return described, parse_header(header, file=name, file_bytes=described.size)
    finally:
        opened.close()


def _refuse_stray(
    directory: Path, tensors: Mapping[str, StoredTensor], announce: Callable[[str], None] | None
) -> None:
    """Raise if `model.safetensors` lies beside an index that does not name it, unless it describes the same tensors.

    transformers takes that file where there is one, and not the index.
    """
    if not (directory / SINGLE_NAME).exists() or any(t.file == SINGLE_NAME for t in tensors.values()):
        return
    if announce is not None:
        announce(SINGLE_NAME)
    _, found = _describe(resolve_inside(directory, SINGLE_NAME), SINGLE_NAME)
    other = {(t.name, t.dtype, t.shape) for t in found} ^ {
        (t.name, t.dtype, t.shape) for t in tensors.values()
    }
    if other:
        name = min(each[0] for each in other)
        raise DamagedFileError(
            f"{directory / SINGLE_NAME}: expected no such file beside an index that does not name it, got one with other tensors "
            f"({name}). from_pretrained would load this file. Remove the one of the two that does not belong there."
        )
