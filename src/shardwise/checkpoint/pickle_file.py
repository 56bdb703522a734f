"""`pytorch_model.bin`: read without running code, whole, on one rank."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from shardwise.checkpoint.index_file import read_index, resolve_inside
from shardwise.checkpoint.regular_file import require_regular
from shardwise.errors import CheckpointError, DamagedFileError, UnsupportedFormatError

INDEX_ENDING = ".bin.index.json"
PICKLE_ENDINGS = (".bin", INDEX_ENDING)
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
_UNWANTED_GLOBAL = re.compile(r"GLOBAL (?P<name>\S+)")


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickle file, or of all files of an index.

    Only `torch.load(weights_only=True)` reads them. Files of torch 1.6 and later are mapped privately: memory is used where a
    tensor is read, and writing to one does not change the file. Older ones, and compressed ones, are read whole.

    Args:
        path: A `.bin` file or a `.bin.index.json`.

    Returns:
        Tensors by checkpoint name, detached, in host memory.

    Raises:
        UnsupportedFormatError: A file wants to run code, or is of a kind that only code can read.
        DamagedFileError: A file is not what torch.save writes, or files and index contradict each other.
        CheckpointError: It cannot be read, is not inside of the directory, or does not hold tensors by name.
    """
    if not path.name.endswith(INDEX_ENDING):
        return _load_one(path)
    index = read_index(path)
    tensors: dict[str, torch.Tensor] = {}
    file_of: dict[str, str] = {}
    for file in sorted(set(index.values())):
        for name, tensor in _load_one(resolve_inside(path.parent, file)).items():
            if name in file_of:
                raise DamagedFileError(
                    f"{path}: expected each tensor in one file, got {name} in {file_of[name]} and {file}. Get the checkpoint again."
                )
            tensors[name], file_of[name] = tensor, file
    for name, file in index.items():
        if file_of.get(name) != file:
            raise DamagedFileError(
                f"{path}: expected {name} in {file}, got it in {file_of.get(name, 'no file')}. The index belongs to other files: "
                "get the checkpoint again."
            )
    return tensors


def _load_one(path: Path) -> dict[str, torch.Tensor]:
    found = _unpickled(path)
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path}: expected tensors by name, got {type(found).__name__}. Save model.state_dict() in its place."
        )
    return {name: _checked(path, name, value) for name, value in found.items()}


def _unpickled(path: Path) -> Any:
    try:
        require_regular(path)  # torch.load would wait for a writer of a FIFO
        mapped = _is_mappable(path)
        with warnings.catch_warnings():
            # Of pickle protocols and TorchScript; what matters is raised below.
            warnings.simplefilter("ignore")
            return torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UnsupportedFormatError(
            f"{path}: expected tensors only, got a pickle that torch.load(weights_only=True) refuses, since it can run code: "
            f"{_complaint(error)}. Convert it to safetensors on a machine you trust; if it is none of yours, do not use it."
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    except RuntimeError as error:
        # TorchScript archives and the tar files of torch 0.1 are code, or read by code.
        if "Cannot use ``weights_only=True``" in str(error):
            raise UnsupportedFormatError(
                f"{path}: expected a file of torch.save, got one that torch.load(weights_only=True) does not read "
                "(TorchScript, or a torch 0.1 tar file). Convert it to safetensors on a machine you trust."
            ) from None
        raise _damaged(path, error) from error
    except CheckpointError:
        raise
    except Exception as error:  # an unpickler fails in any way on bytes that it was not made for
        raise _damaged(path, error) from error


def _is_mappable(path: Path) -> bool:
    """Return whether the tensors' bytes lie in a file as they are: a zip file whose entries are not compressed."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
        try:
            with zipfile.ZipFile(file) as archive:
                return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        except (zipfile.BadZipFile, NotImplementedError, ValueError):
            return True  # torch.load says what is wrong with it


def _checked(path: Path, name: object, value: object) -> torch.Tensor:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        hint = "Save a dictionary of tensors alone."
        if name in _WRAPPERS and isinstance(value, dict):
            hint = f"The state dict lies inside: save torch.load(file, weights_only=True)[{name!r}] alone, as safetensors if you can."
        raise CheckpointError(
            f"{path}: expected tensors by name, got {type(value).__name__} under {name!r}. {hint}"
        )
    if value.is_meta or value.layout != torch.strided or value.is_quantized:
        kind = "on meta, without values" if value.is_meta else f"of layout {value.layout}"
        kind = "quantised" if value.is_quantized else kind
        raise UnsupportedFormatError(
            f"{path}: expected dense tensors, got {name} {kind}. Make it dense and save the file again."
        )
    return value.detach()


def _complaint(error: pickle.UnpicklingError) -> str:
    """Return the part of torch's message that is about the file; the rest advises to run its code."""
    text = str(error)
    wanted = _UNWANTED_GLOBAL.search(text)
    if wanted is not None:
        return f"it calls {wanted['name']}"
    lines = [
        line.strip() for line in text.rpartition("WeightsUnpickler error:")[2].splitlines() if line.strip()
    ]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _damaged(path: Path, error: Exception) -> DamagedFileError:
    text = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    return DamagedFileError(
        f"{path}: expected a file of torch.save, got {text.rstrip('.')}. Get the file again."
    )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: expected a readable file, got {error.strerror or error}. Check the path and its permissions."
    )
