"""Write and read tensors through torch's distributed checkpoint, without running what a file says.

torch keeps its index (`.metadata`) as a pickle and unpickles it freely; values that are not tensors too. Here only tensors are
written, which torch reads with `weights_only=True`; and the index is unpickled with the few classes that it needs.

Source: `FileSystemWriter` and `FileSystemReader` in torch/distributed/checkpoint/filesystem.py, torch 2.11 to 2.13.
`tests/unit/test_sharded_files.py` fails when the index needs other classes.
"""

from __future__ import annotations

import pickle
import shutil
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save, save

from shardwise.errors import DamagedFileError, listed

INDEX_NAME = ".metadata"
_CLASSES = {
    (metadata.__name__, name)
    for name in (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    (filesystem.__name__, "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


def write_tensors(
    tensors: dict[str, torch.Tensor], directory: Path, *, group: dist.ProcessGroup | None
) -> None:
    """Write tensors, each rank its shards. All ranks of the group call this together.

    Args:
        tensors: By name; a plain tensor is one for all ranks that have its name.
        directory: Empty or not there.
        group: None is the default one.

    Raises:
        DamagedFileError: A file could not be written.
    """
    try:
        save(dict(tensors), storage_writer=filesystem.FileSystemWriter(directory), process_group=group)
    except CheckpointException as error:
        raise _unwritten(directory, error) from error


def begin_writing(
    tensors: dict[str, torch.Tensor], directory: Path, *, group: dist.ProcessGroup
) -> Future[Any]:
    """Copy shards into host memory, and write the copies from a thread. All ranks of the group call this together.

    Args:
        tensors: As for `write_tensors`; they may change once this has returned.
        directory: Empty or not there.
        group: Of gloo, used by that thread alone until it is done.

    Returns:
        What ends when this rank has written its part.
    """
    writer = filesystem.FileSystemWriter(
        directory
    )  # which makes the copies, also of tensors that are in host memory
    begun = async_save(dict(tensors), storage_writer=writer, process_group=group)
    return begun.upload_completion if isinstance(begun, AsyncSaveResponse) else begun


def end_writing(begun: Future[Any], directory: Path, *, timeout_seconds: float) -> None:
    """Wait for what `begin_writing` began.

    Raises:
        DamagedFileError: A file could not be written, or was not in time.
    """
    try:
        begun.result(timeout_seconds)
    except CheckpointException as error:
        raise _unwritten(directory, error) from error
    except TimeoutError as error:
        raise DamagedFileError(
            f"{directory}: could not be written within {timeout_seconds:g} s. Look at its file system, or pass a longer timeout."
        ) from error


def require_files(directory: Path) -> None:
    """Look for what all ranks have written, where the first one has.

    Raises:
        DamagedFileError: A file that the index names is not there.
    """
    named = {stored.relative_path for stored in _Reader(directory).read_metadata().storage_data.values()}
    gone = sorted(name for name in named if not (directory / name).is_file())
    if gone:
        raise DamagedFileError(
            f"{directory}: expected the files of all ranks, got none of the name {listed(gone)}: their ranks have written "
            "elsewhere. Name the same directory on every rank, on a file system that all share."
        )


def read_tensors(
    tensors: dict[str, torch.Tensor], directory: Path, *, group: dist.ProcessGroup | None
) -> None:
    """Read into tensors in place, each rank its shards. All ranks of the group call this together.

    Args:
        tensors: By name, with storage; of the shapes that the directory has, sharded in any way.
        directory: As `write_tensors` left it.
        group: None is the default one.

    Raises:
        DamagedFileError: A file is missing or cut short.
    """
    try:
        load(dict(tensors), storage_reader=_Reader(directory), process_group=group)
    except CheckpointException as error:
        raise DamagedFileError(
            f"{directory}: could not be read, and the model now holds parts of it: {_causes(error)}. Load another "
            "checkpoint before training further."
        ) from error


def read_index(directory: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every tensor that a directory holds.

    Raises:
        DamagedFileError: The index is missing, is not one, or names something that tensors do not need.
    """
    found = _Reader(directory).read_metadata().state_dict_metadata
    return {
        name: (tuple(of.size), of.properties.dtype)
        for name, of in found.items()
        if isinstance(of, metadata.TensorStorageMetadata)
    }


class _Reader(filesystem.FileSystemReader):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._directory = directory

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        path = self._directory / INDEX_NAME
        try:
            with path.open("rb") as file:
                read = _Unpickler(file).load()
        except OSError as error:
            raise DamagedFileError(f"{path}: expected the index of a training state: {error}") from error
        except Exception as error:  # a damaged pickle raises nearly anything
            raise DamagedFileError(f"{path}: expected the index of a training state: {error}") from error
        if not isinstance(read, metadata.Metadata) or not isinstance(read.storage_data, dict):
            raise DamagedFileError(
                f"{path}: expected the index of a training state, got {type(read).__name__}"
            )
        for stored in read.storage_data.values():
            name = stored.relative_path
            if not isinstance(name, str) or PurePath(name).name != name or name in ("", ".."):
                raise DamagedFileError(f"{path}: expected names of files beside it, got {name!r}")
        if read.storage_meta is None:
            read.storage_meta = metadata.StorageMeta()
        read.storage_meta.load_id = self.load_id
        return read


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _CLASSES and not is_dtype:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors needs")
        return super().find_class(module, name)


def _unwritten(directory: Path, error: CheckpointException) -> DamagedFileError:
    """Return the error of a save. torch says little of a full disk; so what is free there is said here."""
    free = ""
    with suppress(OSError):
        free = f" (where {shutil.disk_usage(directory.parent).free / 2**20:,.1f} MiB are free)"
    return DamagedFileError(
        f"{directory}: could not be written{free}: {_causes(error)}. Free space there, or save to another file system."
    )


def _causes(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
