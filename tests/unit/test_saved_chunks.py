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
    found = read(directory)
    assert found.keys() == {"a", "b"}
    for name, (chunk,) in found.items():
        assert torch.equal(chunk.tensor, tensors[f"model.{name}"])


def test_a_file_larger_than_memory_is_mapped(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, tensors = saved
    os.truncate(data_file(directory), 2**42)
    (chunk,) = read(directory)["a"]
    assert torch.equal(chunk.tensor, tensors["model.a"])


def test_bytes_that_are_not_those_that_were_written_are_named(
    saved: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    directory, tensors = saved
    flip(directory, tensors["model.a"])
    with pytest.raises(DamagedFileError, match=r"expected model\.a at byte .*not those that were written"):
        read(directory)
    assert read(directory, part=None)["a"]
    checked_by = [number for number in range(3) if is_refused(directory, (number, 3))]
    assert len(checked_by) == 1  # the ranks share it


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    from torch.serialization import set_crc32_options

    set_crc32_options(False)
    try:
        write_tensors({"model.a": torch.ones(5)}, tmp_path, group=None)
    finally:
        set_crc32_options(True)
    assert read(tmp_path)["a"]


def is_refused(directory: Path, part: tuple[int, int]) -> bool:
    try:
        read(directory, part=part)
    except DamagedFileError:
        return True
    return False


def read(directory: Path, *, part: tuple[int, int] | None = (0, 1)) -> dict[str, Any]:
    return saved_chunks(directory, prefix="model.", part=part, step=lambda: None)


def flip(directory: Path, of: torch.Tensor) -> None:
    path = data_file(directory)
    content = bytearray(path.read_bytes())
    content[content.index(of.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)


def test_no_address_space_is_not_called_damage(
    saved: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(
        CheckpointError, match=r"Cannot allocate memory. Nothing is wrong with the file"
    ) as raised:
        read(saved[0])
    assert not isinstance(raised.value, DamagedFileError)


def data_file(directory: Path) -> Path:
    (path,) = directory.glob("*.distcp")
    return path
