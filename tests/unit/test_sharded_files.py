"""What the index of a training state may name, and what a training state may hold: nothing that runs code."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem, metadata

import shardwise as sw
from shardwise.transformers_model import resume
from shardwise.transformers_model.sharded_files import INDEX_NAME, read_index, read_tensors, write_tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


class Harmful:
    """Says, where it is unpickled, that a folder be made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def written(directory: Path) -> Path:
    write_tensors({"a/weight": torch.arange(6.0).reshape(2, 3)}, directory, group=None)
    return directory


def test_tensors_come_back(tmp_path: Path) -> None:
    stored = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor(3, dtype=torch.int64),
        "c": torch.ones(4, dtype=torch.bfloat16),
        "d": torch.arange(5, dtype=torch.uint8),
    }
    write_tensors(stored, tmp_path / "state", group=None)
    assert read_index(tmp_path / "state") == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()
    }
    read = {name: torch.zeros_like(tensor) for name, tensor in stored.items()}
    read_tensors(read, tmp_path / "state", group=None)
    assert all(torch.equal(read[name], tensor) for name, tensor in stored.items())


def test_an_index_that_names_other_code_does_not_run_it(tmp_path: Path) -> None:
    index = written(tmp_path / "state") / INDEX_NAME
    index.write_bytes(pickle.dumps(Harmful(tmp_path / "made")))
    with pytest.raises(
        sw.DamagedFileError, match=r"it names (posix|nt)\.mkdir, which no index of tensors needs"
    ):
        read_index(tmp_path / "state")
    assert not (tmp_path / "made").exists()


def test_code_hidden_in_an_index_does_not_run(tmp_path: Path) -> None:
    index = written(tmp_path / "state") / INDEX_NAME
    read = pickle.loads(index.read_bytes())
    read.planner_data = Harmful(tmp_path / "made")
    index.write_bytes(pickle.dumps(read))
    with pytest.raises(sw.DamagedFileError, match="which no index of tensors needs"):
        read_tensors({"a/weight": torch.zeros(2, 3)}, tmp_path / "state", group=None)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "sub/file", "..", ""])
def test_an_index_names_files_beside_it(tmp_path: Path, name: str) -> None:
    index = written(tmp_path / "state") / INDEX_NAME
    read = pickle.loads(index.read_bytes())
    key = next(iter(read.storage_data))
    read.storage_data[key] = filesystem._StorageInfo(relative_path=name, offset=0, length=1)
    index.write_bytes(pickle.dumps(read))
    with pytest.raises(sw.DamagedFileError, match="expected names of files beside it"):
        read_index(tmp_path / "state")


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", pickle.dumps(OrderedDict()), pickle.dumps([1]), pickle.dumps(torch.Size([1]))],
    ids=["empty", "text", "other class", "list", "allowed class"],
)
def test_what_is_not_an_index_is_refused(tmp_path: Path, content: bytes) -> None:
    index = written(tmp_path / "state") / INDEX_NAME
    index.write_bytes(content)
    with pytest.raises(sw.DamagedFileError, match="expected the index of a training state"):
        read_index(tmp_path / "state")
    index.unlink()
    with pytest.raises(sw.DamagedFileError, match="expected the index of a training state"):
        read_index(tmp_path / "state")


def test_an_index_with_values_that_are_not_tensors_has_none_of_them(tmp_path: Path) -> None:
    index = written(tmp_path / "state") / INDEX_NAME
    read = pickle.loads(index.read_bytes())
    read.state_dict_metadata["code"] = metadata.BytesStorageMetadata()
    index.write_bytes(pickle.dumps(read))
    with pytest.raises(sw.DamagedFileError, match="BytesStorageMetadata, which no index of tensors needs"):
        read_index(tmp_path / "state")


def test_a_tensor_that_hides_code_does_not_run_it(tmp_path: Path) -> None:
    directory = written(tmp_path / "state")
    file = next(directory.glob("*.distcp"))
    index = pickle.loads((directory / INDEX_NAME).read_bytes())
    torch.save(Harmful(tmp_path / "made"), file)
    key = next(iter(index.storage_data))
    index.storage_data[key] = filesystem._StorageInfo(
        relative_path=file.name, offset=0, length=file.stat().st_size
    )
    (directory / INDEX_NAME).write_bytes(pickle.dumps(index))
    with pytest.raises(sw.DamagedFileError, match="could not be read"):
        read_tensors({"a/weight": torch.zeros(2, 3)}, directory, group=None)
    assert not (tmp_path / "made").exists()


def test_the_state_beside_the_tensors_does_not_run_code(tmp_path: Path) -> None:
    torch.save({"format": 1, "step": Harmful(tmp_path / "made")}, tmp_path / resume.STATE_NAME)
    with pytest.raises(sw.DamagedFileError, match="expected the state of a training"):
        resume._read_state(tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_state_of_another_format_is_refused(tmp_path: Path) -> None:
    torch.save({"format": 2}, tmp_path / resume.STATE_NAME)
    with pytest.raises(sw.CheckpointError, match="expected format 1, got 2"):
        resume._read_state(tmp_path)
