"""The tensors of a saved training as pages of its files: nothing is read into memory of this process.

torch's distributed checkpoint keeps each rank's shard of a tensor as a file of `torch.save` inside a larger file: a ZIP archive
without compression, one record of which is the shard's bytes.

Source: `_write_item` and `FileSystemReader.read_data` in torch/distributed/checkpoint/filesystem.py, torch 2.11 to 2.13.
"""

from __future__ import annotations

import errno
import io
import mmap
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import metadata

from shardwise.errors import CheckpointError, DamagedFileError
from shardwise.export.chunks import Chunk
from shardwise.tensors import Region
from shardwise.transformers_model.sharded_files import _Reader

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a record in a ZIP archive
_CHECKED_BYTES = 2**26  # at once
_PAYLOAD, _BYTE_ORDER = "data/0", "byteorder"


def saved_chunks(
    directory: Path, *, prefix: str, part: tuple[int, int] | None, step: Callable[[], None]
) -> dict[str, list[Chunk]]:
    """Return the tensors of a saved training whose names have a prefix, as boxes, by the rest of their names.

    Args:
        directory: As `write_tensors` left it.
        prefix: Of the names; it is taken off.
        part: Of the boxes, whose bytes are read and compared with their archive's checksum: every how manieth one, from which on,
            as `(first, step)`; None for none of them.
        step: Called while bytes are compared.

    Raises:
        CheckpointError: There is no address space for a file.
        DamagedFileError: A file is missing or cut short, or is not what the index says.
    """
    index = _Reader(directory).read_metadata()
    pages: dict[str, mmap.mmap] = {}
    found: dict[str, list[Chunk]] = {}
    count = 0
    for name, of in index.state_dict_metadata.items():
        if not name.startswith(prefix) or not isinstance(of, metadata.TensorStorageMetadata):
            continue
        chunks = []
        for number, box in enumerate(of.chunks):
            key = metadata.MetadataIndex(name, box.offsets, number)
            stored = index.storage_data.get(key)
            if stored is None:
                raise DamagedFileError(
                    f"{directory}: expected a place for {name} at {tuple(box.offsets)}, got none"
                )
            path = directory / stored.relative_path
            try:
                tensor, record, checksum = _mapped(path, stored.offset, stored.length, pages)
                # Of an archive that was written without checksums (`torch.serialization.set_crc32_options`) it is 0.
                if part is not None and count % part[1] == part[0] and checksum:
                    _require_checksum(record, checksum, step)
                count += 1
            except Exception as error:  # of zipfile, torch.load, the system
                if isinstance(error, OSError) and error.errno == errno.ENOMEM:
                    raise CheckpointError(
                        f"{path}: mapping its {path.stat().st_size:,} bytes failed: {error.strerror}. Nothing is wrong with the file: "
                        "raise the limit of this process's address space (ulimit -v) or of its mappings (vm.max_map_count)."
                    ) from error
                raise DamagedFileError(
                    f"{path}: expected {name} at byte {stored.offset:,}: {error}"
                ) from error
            region = Region(
                start=tuple(box.offsets),
                stop=tuple(at + size for at, size in zip(box.offsets, box.sizes, strict=True)),
            )
            if tuple(tensor.shape) != region.shape or tensor.dtype != of.properties.dtype:
                raise DamagedFileError(
                    f"{path}: expected {name} of shape {region.shape} and {of.properties.dtype} at byte {stored.offset:,}, got "
                    f"{tuple(tensor.shape)} and {tensor.dtype}"
                )
            chunks.append(Chunk(region=region, tensor=tensor))
        found[name.removeprefix(prefix)] = chunks
    return found


def _mapped(
    path: Path, offset: int, length: int, pages: dict[str, mmap.mmap]
) -> tuple[torch.Tensor, memoryview, int]:
    """Return a tensor, its bytes, and their checksum as the archive has it."""
    with path.open("rb") as file:
        view = io.BufferedReader(_Section(file, offset, length))
        with zipfile.ZipFile(view) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        # Not through the archive, which refuses records that were written without checksums.
        file.seek(_start_of(file, offset, records[_BYTE_ORDER]))
        order = file.read(records[_BYTE_ORDER].file_size).decode()
        view.seek(0)
        like: torch.Tensor = torch.load(view, map_location="meta", weights_only=True)
        payload = records[_PAYLOAD]
        start = _start_of(file, offset, payload)
        expected = like.untyped_storage().nbytes()
        if (
            order != sys.byteorder
            or payload.compress_type != zipfile.ZIP_STORED
            or payload.file_size != expected
        ):
            raise ValueError(
                f"{payload.file_size} bytes of order {order}, method {payload.compress_type}; expected {expected}"
            )
        if not expected:
            return torch.empty(like.shape, dtype=like.dtype, device="cpu"), memoryview(b""), 0
        if path.name not in pages:
            # For reading alone: of pages that could be written to, memory would have to be there for the whole file.
            pages[path.name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if start + expected > len(pages[path.name]):
        raise ValueError(f"the file ends at byte {len(pages[path.name]):,}")
    # Archives follow each other at any byte: elements need not lie at multiples of their size, which only costs time.
    count = expected // like.dtype.itemsize
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nor is it written to
        flat = torch.frombuffer(pages[path.name], dtype=like.dtype, count=count, offset=start)
    tensor = flat.as_strided(like.shape, like.stride(), like.storage_offset())
    return tensor, memoryview(pages[path.name])[start : start + expected], payload.CRC


def _start_of(file: BinaryIO, offset: int, record: zipfile.ZipInfo) -> int:
    """Return where in a file the bytes of a record are, of the archive that begins at an offset."""
    file.seek(offset + record.header_offset)
    header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return offset + record.header_offset + _LOCAL_HEADER.size + int(header[-2]) + int(header[-1])


def _require_checksum(record: memoryview, expected: int, step: Callable[[], None]) -> None:
    found = 0
    for low in range(0, len(record), _CHECKED_BYTES):
        found = zlib.crc32(record[low : low + _CHECKED_BYTES], found)
        step()
    if found != expected:
        raise ValueError(
            f"its contents are not those that were written: checksum {found:08x}, expected {expected:08x}"
        )


class _Section(io.RawIOBase):
    """A part of a file as a file.

    Args:
        file: Open for reading.
        start: First byte of the part.
        nbytes: Of the part.
    """

    def __init__(self, file: BinaryIO, start: int, nbytes: int) -> None:
        self._file, self._start, self._nbytes, self._at = file, start, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, into: Any) -> int:
        self._file.seek(self._start + self._at)
        read = self._file.read(min(len(into), max(0, self._nbytes - self._at)))
        into[: len(read)] = read
        self._at += len(read)
        return len(read)
