"""`pytorch_model.bin`: read without running code, whole, on one rank."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from shardwise.checkpoint.index_file import read_index, resolve_inside
from shardwise.errors import CheckpointError, DamagedFileError, UnsupportedFormatError

INDEX_ENDING = ".bin.index.json"


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickle file, or of all files of an index; zip files are mapped, not copied.

    Args:
        path: A `.bin` file or a `.bin.index.json`.

    Raises:
        UnsupportedFormatError: It wants to run code.
        CheckpointError: It does not hold tensors by name.
    """
    if not path.name.endswith(INDEX_ENDING):
        return _load_one(path)
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(read_index(path).values())):
        tensors |= _load_one(resolve_inside(path.parent, name))
    return tensors


def _load_one(path: Path) -> dict[str, torch.Tensor]:
    try:
        try:
            found = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            found = torch.load(path, weights_only=True, map_location="cpu")  # the format before zip files
    except pickle.UnpicklingError as error:
        raise UnsupportedFormatError(
            f"{path}: expected tensors only, got a pickle that torch.load(weights_only=True) refuses, since it can run code: "
            f"{str(error).splitlines()[0]} Convert it to safetensors on a machine you trust."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise DamagedFileError(f"{path}: expected a torch file, got {error}. Get the file again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected tensors by name, got {type(found).__name__}.")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path}: expected tensors by name, got {type(value).__name__} under {name!r}. If the state dict lies inside, save it "
                "alone."
            )
    return found
