"""Files that nobody may trust: of another kind than a file, and made to cost time."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import shardwise as sw
from shardwise.checkpoint import SafetensorsSource, load_pickle
from shardwise.checkpoint.index_file import read_index
from shardwise.checkpoint.regular_file import open_regular, read_text
from shardwise.errors import CheckpointError, DamagedFileError
from shardwise.materialization.structure import structure_difference
from tests.unit.descriptors import open_in

INDEX = "model.safetensors.index.json"
_PATIENCE_SECONDS = 120


def in_time(call: Callable[[], Any]) -> BaseException | None:
    """Return what a call raised; fail where it does not come back."""
    raised: list[BaseException | None] = []

    def attempt() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)
        else:
            raised.append(None)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_PATIENCE_SECONDS)
    assert raised, "the call waits for ever"
    return raised[0]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may have no more than some hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


KINDS = {"a FIFO": fifo, "a socket": bound_socket, "a directory": Path.mkdir}


def refused(call: Callable[[], Any], *texts: str) -> None:
    error = in_time(call)
    assert isinstance(error, CheckpointError), repr(error)
    for text in ("expected a regular file", *texts):
        assert text in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "model.safetensors")
    model = torch.nn.Linear(2, 2, device="meta")
    refused(lambda: sw.materialize(model, tmp_path), "model.safetensors", f"got {kind}")


@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_descriptions_must_be_regular_files_too(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    fifo(tmp_path / name)
    refused(lambda: SafetensorsSource.open(tmp_path), name, "got a FIFO")


def test_a_pickle_file_of_an_index(tmp_path: Path) -> None:
    fifo(tmp_path / "one.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "one.bin"}}))
    refused(lambda: load_pickle(tmp_path / "pytorch_model.bin.index.json"), "one.bin", "got a FIFO")


def test_a_file_that_becomes_a_fifo_between_stat_and_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    status = path.stat()
    path.unlink()
    fifo(path)
    monkeypatch.setattr(Path, "stat", lambda *_, **__: status)
    refused(lambda: open_regular(path, flags=0), "got a FIFO")
    monkeypatch.undo()
    assert open_in(path) == []


def test_a_file_larger_than_it_may_be_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(DamagedFileError, match="expected a text of at most 1,000 bytes, got more"):
        read_text(path, most_bytes=1000, what="a text")
    path.write_bytes(b"\xff")
    with pytest.raises(DamagedFileError, match="expected a text in UTF-8"):
        read_text(path, most_bytes=1000, what="a text")
    with pytest.raises(CheckpointError, match="ENOENT"):
        read_text(tmp_path / "gone", most_bytes=1, what="a text")


@pytest.mark.skipif(not os.path.exists("/proc/version"), reason="files without a size are those of Linux")
def test_a_file_whose_size_the_system_does_not_say_is_read_whole() -> None:
    path = Path("/proc/version")
    assert path.stat().st_size == 0
    whole = path.read_text()
    assert read_text(path, most_bytes=len(whole), what="a text") == whole
    with pytest.raises(DamagedFileError, match="got more"):
        read_text(path, most_bytes=len(whole) - 1, what="a text")


# --- time that grows with the square of the size would be minutes here ---

MANY = 60_000


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def test_a_key_that_is_twice_in_a_long_index(tmp_path: Path) -> None:
    entries = ",".join(f'"k{number}":"a"' for number in range(MANY))
    path = tmp_path / INDEX
    path.write_text(f'{{"weight_map":{{{entries},"k{MANY - 1}":"a"}}}}')

    def read() -> None:
        with pytest.raises(DamagedFileError, match=f"'k{MANY - 1}' twice"):
            read_index(path)

    assert seconds_of(read) < 5


def test_long_structures_that_differ() -> None:
    lines = [f"parameter layers.{number}.weight: (4, 4) float32 trainable" for number in range(MANY // 10)]
    expected, got = json.dumps(lines), json.dumps([*lines[:-1], "parameter other"])
    told: list[str] = []
    assert seconds_of(lambda: told.append(structure_difference(expected, got, limit=3))) < 2
    assert told == [f"expected {lines[-1]}, got parameter other"]
