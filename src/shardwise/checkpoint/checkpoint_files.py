"""Which safetensors files a checkpoint consists of, by their names."""

from __future__ import annotations

from pathlib import Path

from shardwise.checkpoint.index_file import INDEX_NAME, check_file_name, read_index
from shardwise.checkpoint.pickle_file import PICKLE_ENDINGS
from shardwise.errors import CheckpointError, UnsupportedFormatError

SINGLE_NAME = "model.safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def directory_of(path: Path) -> Path:
    """Return the directory of the files of a checkpoint, given itself, its index or its only file."""
    if path.is_dir():
        return path
    # An index counts where it stands; a file that was named counts wherever it links to.
    return path.parent if path.name.endswith(".index.json") else path.resolve().parent


def files_of(path: Path) -> tuple[Path, list[str], dict[str, str] | None]:
    """Return directory, file names and index of a checkpoint; no file is opened but the index.

    Args:
        path: As `SafetensorsSource.open` takes it.

    Raises:
        CheckpointError: There are none, the index is damaged, or a name leads out of the directory.
        UnsupportedFormatError: There are only pickle files.
    """
    if path.is_file():
        if path.name.endswith(".index.json"):
            index = read_index(path)
            return directory_of(path), sorted(set(index.values())), index
        if path.suffix == ".json":
            raise UnsupportedFormatError(
                f"{path}: expected a checkpoint's directory or a .safetensors file, got a .json file. Give the directory: "
                f"{path.parent}"
            )
        if path.suffix != ".safetensors":
            raise UnsupportedFormatError(
                f"{path}: expected a .safetensors file, got {path.suffix or 'no ending'}. Convert it with "
                "safetensors.torch.save_file."
            )
        return directory_of(path), [path.resolve().name], None
    if (path / INDEX_NAME).exists():
        index = read_index(path / INDEX_NAME)
        return path, sorted(set(index.values())), index
    found = sorted(item.name for item in path.iterdir() if item.suffix == ".safetensors")
    if SINGLE_NAME in found:
        found = [SINGLE_NAME]
    if not found:
        pickles = sorted(item.name for item in path.iterdir() if item.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise UnsupportedFormatError(
                f"{path / pickles[0]}: expected safetensors files, got only pickle files, which can run code. Convert them "
                "with save_pretrained on a machine you trust; or use load_pretrained(defer=False); or pass the path of "
                "pytorch_model.bin itself to shardwise.materialize, which reads it with torch.load(weights_only=True) on one rank."
            )
        raise CheckpointError(
            f"{path}: expected safetensors files, got none. Is this the checkpoint's directory?"
        )
    for name in found:
        check_file_name(name, what=str(path))
    return path, found, None


def require_files(path: Path) -> None:
    """Raise unless a path has files of a checkpoint, as far as their names say; none is opened but an index.

    Args:
        path: Directory or file on this machine. A pickle file passes: who opens it says whether it takes one.

    Raises:
        CheckpointError: It has none, or an index that is damaged.
    """
    if not path.name.endswith(PICKLE_ENDINGS):
        files_of(path)
