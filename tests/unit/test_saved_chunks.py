"""The tensors of a saved training as pages of its files."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.errors import CheckpointError, DamagedFileError
from shardwise.transformers_model.saved_chunks import saved_chunks
from shardwise.transformers_model.sharded_files import write_tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = {"model.a": torch.randn(64, 33), "model.b": torch.arange(7), "other": torch.zeros(3)}
    write_tensors(dict(tensors), tmp_path, group=None)
    return tmp_path, tensors


def test_they_are_what_was_saved(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, tensors = saved
    found = saved_chunks(directory, prefix="model.")
    assert found.keys() == {"a", "b"}
    for name, (chunk,) in found.items():
        assert torch.equal(chunk.tensor, tensors[f"model.{name}"])


def test_a_file_larger_than_memory_is_mapped(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, tensors = saved
    os.truncate(data_file(directory), 2**42)
    (chunk,) = saved_chunks(directory, prefix="model.")["a"]
    assert torch.equal(chunk.tensor, tensors["model.a"])


def test_no_address_space_is_not_called_damage(
    saved: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(
        CheckpointError, match=r"Cannot allocate memory. Nothing is wrong with the file"
    ) as raised:
        saved_chunks(saved[0], prefix="model.")
    assert not isinstance(raised.value, DamagedFileError)


def data_file(directory: Path) -> Path:
    (path,) = directory.glob("*.distcp")
    return path
