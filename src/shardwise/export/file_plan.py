"""Which files a checkpoint is written as, and where in them each tensor lies: known from shapes alone, the same on all ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from shardwise.checkpoint import StoredTensor
from shardwise.checkpoint.safetensors_layout import laid_out
from shardwise.conversion import SavedTensor
from shardwise.errors import ConfigurationError

INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """A safetensors file to be written.

    Args:
        name: Within the directory.
        header: Its first bytes, up to the first tensor's.
        nbytes: Its size.
    """

    name: str
    header: bytes
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """All files of a checkpoint's tensors.

    Args:
        files: In the order of their numbers.
        stored: Where each tensor lies, by checkpoint name.
        index_name: Of the file that says which tensor is in which file; None where there is one file.
        index: Its text.
    """

    files: tuple[PlannedFile, ...]
    stored: Mapping[str, StoredTensor]
    index_name: str | None
    index: str

    @property
    def nbytes(self) -> int:
        """Size of all files together, without the index."""
        return sum(file.nbytes for file in self.files)

    def lines(self) -> list[str]:
        """Return a line for each tensor, equal exactly where ranks would put the same one at the same place."""
        return [f"{of.name} {of.shape} {of.dtype} in {of.file} at {of.start}" for of in self.stored.values()]


def plan_files(
    saved: Sequence[SavedTensor], *, weights_name: str, max_shard_size: int | str, parameters: int
) -> FilePlan:
    """Plan the files.

    Args:
        saved: Tensors in the order in which they are distributed over files.
        weights_name: Of the file, or of what files' names are made of where there are several: `model.safetensors`.
        max_shard_size: Most bytes of tensors in one file, or a text such as `"5GB"`; a larger tensor has a file of its own.
        parameters: Of the model, for the index.

    Raises:
        ConfigurationError: The size cannot be read.
        UnsupportedFormatError: safetensors has no such dtype.
    """
    stem, _, extension = weights_name.rpartition(".")
    kinds = {each.name: (each.shape, each.dtype) for each in saved}
    try:
        split = split_state_dict_into_shards_factory(
            kinds,
            get_storage_size=_nbytes,
            filename_pattern=f"{stem}{{suffix}}.{extension}",
            max_shard_size=max_shard_size,
        )
    except (ValueError, TypeError) as error:
        raise ConfigurationError(
            f"max_shard_size: expected bytes as a number or a text such as '5GB' or '200MB', got {max_shard_size!r}: {error}"
        ) from error
    files: list[PlannedFile] = []
    stored: dict[str, StoredTensor] = {}
    for name, tensors in split.filename_to_tensors.items():
        header, of_file = laid_out({t: kinds[t] for t in tensors}, file=name, metadata={"format": "pt"})
        stored |= of_file
        files.append(
            PlannedFile(
                name=name,
                header=header,
                nbytes=max((len(header), *(tensor.stop for tensor in of_file.values()))),
            )
        )
    index = {
        "metadata": {"total_parameters": parameters, **split.metadata},
        "weight_map": split.tensor_to_filename,
    }
    return FilePlan(
        files=tuple(files),
        stored=stored,
        index_name=f"{weights_name}{INDEX_SUFFIX}" if split.is_sharded else None,
        index=json.dumps(index, indent=2, sort_keys=True) + "\n",
    )


def check_max_shard_size(max_shard_size: int | str) -> None:
    """Raise unless a size can be read.

    Raises:
        ConfigurationError: With what can be.
    """
    plan_files((), weights_name="model.safetensors", max_shard_size=max_shard_size, parameters=0)


def _nbytes(kind: tuple[tuple[int, ...], torch.dtype]) -> int:
    shape, dtype = kind
    return torch.Size(shape).numel() * dtype.itemsize
