"""A training's checkpoints on disk: which is gone on from, which are kept, and what is stored before what is removed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.errors import CheckpointError, ConfigurationError
from shardwise.materialization import Agreement
from shardwise.training.checkpoints import directory_of
from shardwise.training.resuming import Start, find_start, make_way
from shardwise.training.saving import Saver
from shardwise.transformers_model import resume

IDENTITY = {"seed": 5}


class FakeModel:
    """Saves a file, as the facade does."""

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        (directory / "weights").write_bytes(directory.name.encode())


def agree(call: str) -> Agreement:
    return Agreement((0,), timeout_seconds=20, call=call)


def saver(folder: Path, *, keep: int | None = None) -> Saver:
    model: Any = FakeModel()
    return Saver(model, folder, run={"identity": IDENTITY, "ranks": 1}, keep=keep, agree=agree)


def saved(folder: Path, steps: Sequence[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        saver(folder).save(step)


def resumed(folder: Path, resume: str | None, notes: list[str]) -> Path | None:
    start = find_start(folder, resume, identity=IDENTITY, agree=agree, note=notes.append)
    return None if start is None else start.directory


def start_at(directory: Path) -> Start:
    return Start(directory=directory, step=10, ranks=1)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("is_damaged", [True, False])
def test_what_is_saved_after_going_back_is_kept_and_gone_on_from(tmp_path: Path, is_damaged: bool) -> None:
    saved(tmp_path, (10, 20, 30))
    first, damaged, last = (directory_of(tmp_path, step) for step in (10, 20, 30))
    resume = str(first)
    if is_damaged:
        (last / "weights").write_bytes(b"longer than it was")
        (damaged / "weights").write_bytes(b"step-00000021")
        resume = "auto"
    notes: list[str] = []
    assert resumed(tmp_path, resume, notes) == first
    make_way(tmp_path, start=start_at(first), agreement=agree("resume"), note=notes.append)
    assert notes[-1].startswith("Going on from step 10, other checkpoints from there on are set aside as")
    assert "step-00000030.abandoned, step-00000020.abandoned: remove" in notes[-1]
    new = saver(tmp_path, keep=1).save(15)
    assert names_in(tmp_path) == [new.name, "step-00000020.abandoned", "step-00000030.abandoned"]
    assert resumed(tmp_path, "auto", notes) == new
    if not is_damaged:  # what was left is there to go back to
        aside = tmp_path / "step-00000020.abandoned"
        assert resumed(tmp_path, str(aside), notes) == aside
        assert json.loads((aside / "run.json").read_text())["step"] == 20


def test_old_checkpoints_are_those_before_the_one_just_written(tmp_path: Path) -> None:
    saved(tmp_path, (10, 20, 30))
    saver(tmp_path, keep=2).save(25)  # of a run beside it, or before `make_way` was there
    assert names_in(tmp_path) == [f"step-000000{step}" for step in (20, 25, 30)]


def test_one_of_the_same_step_is_set_aside_too(tmp_path: Path) -> None:
    saved(tmp_path / "other", (10,))
    saved(tmp_path / "mine", (5, 10))
    start = start_at(directory_of(tmp_path / "other", 10))
    make_way(tmp_path / "mine", start=start, agreement=agree("resume"), note=[].append)
    assert names_in(tmp_path / "mine") == ["step-00000005", "step-00000010.abandoned"]


def test_what_was_set_aside_goes_when_the_training_has_come_as_far(tmp_path: Path) -> None:
    saved(tmp_path, (10, 20, 30))
    start = start_at(directory_of(tmp_path, 10))
    make_way(tmp_path, start=start, agreement=agree("resume"), note=[].append)
    saver(tmp_path).save(20)  # all are kept
    assert names_in(tmp_path) == [
        f"step-000000{name}" for name in ("10", "20", "20.abandoned", "30.abandoned")
    ]
    (tmp_path / "step-mine.abandoned").mkdir()  # nothing of ours
    saver(tmp_path, keep=2).save(25)
    assert names_in(tmp_path)[:-1] == [f"step-000000{name}" for name in ("20", "25", "30.abandoned")]
    saver(tmp_path, keep=2).save(30)
    assert names_in(tmp_path) == [f"step-{name}" for name in ("00000025", "00000030", "mine.abandoned")]


def test_one_that_was_set_aside_is_gone_on_from_though_there_is_another_of_its_step(tmp_path: Path) -> None:
    saved(tmp_path, (10, 20))
    make_way(tmp_path, start=start_at(directory_of(tmp_path, 10)), agreement=agree("resume"), note=[].append)
    saved(tmp_path, (20,))
    aside = tmp_path / "step-00000020.abandoned"
    (aside / "mine").touch()
    start = Start(directory=aside, step=20, ranks=1)
    make_way(tmp_path, start=start, agreement=agree("resume"), note=[].append)
    assert (aside / "mine").exists()
    assert names_in(tmp_path) == ["step-00000010", aside.name, f"{aside.name}.abandoned"]


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced, renamed and removed, in order."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(file: int) -> None:
        done.append(f"sync {os.fstat(file).st_ino}")
        fsync(file)

    def note_replace(source: Path, target: Path) -> None:
        done.append(f"name {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return done


def sync_of(path: Path) -> str:
    return f"sync {path.stat().st_ino}"


def test_a_record_is_on_the_disk_before_older_checkpoints_go(tmp_path: Path, stored: list[str]) -> None:
    saved(tmp_path, (1,))
    stored.clear()
    new = saver(tmp_path, keep=1).save(2)
    assert stored == [
        sync_of(new / "run.json"),
        "name run.json",
        sync_of(new),
        "name .step-00000001.removed",
    ]


def test_a_state_is_on_the_disk_before_it_has_its_name_and_so_is_the_name(
    tmp_path: Path, stored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "require_files", lambda directory: None)
    unfinished, directory = tmp_path / ".saved.unfinished", tmp_path / "saved"
    unfinished.mkdir()
    mesh: Any = None
    training = resume.Training(
        model=torch.nn.Linear(1, 1), optimizer=None, scheduler=None, scaler=None, mesh=mesh, name=None
    )
    resume._write_state(unfinished / resume.STATE_NAME, training, step=1, ranks=1)
    resume.give_name(unfinished, directory, agreement=agree("save"))
    assert stored == [
        sync_of(directory / resume.STATE_NAME),
        sync_of(directory),
        "name saved",
        sync_of(tmp_path),
    ]


@pytest.mark.parametrize("name", ["run.json", "weights"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_what_cannot_be_read_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    saved(tmp_path, (10, 20))
    plain = Path.open

    def opened(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == directory_of(tmp_path, 20) / name:
            raise OSError(number, os.strerror(number), str(path))
        return plain(path, *args, **kwargs)

    def read_text(path: Path, encoding: str) -> str:
        with opened(path, encoding=encoding) as file:
            return str(file.read())

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Path, "read_text", read_text)
    problem = (
        f"step-00000020/{name}: could not be read on rank 0 .*{os.strerror(number)}. The checkpoint may be"
    )
    with pytest.raises(CheckpointError, match=problem):
        resumed(tmp_path, "auto", [])
    assert names_in(tmp_path) == ["step-00000010", "step-00000020"]


def test_where_no_checkpoint_is_whole_the_training_does_not_begin_anew(tmp_path: Path) -> None:
    saved(tmp_path, (10, 20, 30))
    (directory_of(tmp_path, 10) / "weights").write_bytes(b"")
    (directory_of(tmp_path, 20) / "weights").unlink()
    (directory_of(tmp_path, 30) / "run.json").unlink()
    notes: list[str] = []
    with pytest.raises(CheckpointError) as caught:
        resumed(tmp_path, "auto", notes)
    said = str(caught.value)
    assert f"expected a whole checkpoint in {tmp_path}, got none: {tmp_path}/step-00000030 is half" in said
    assert "step-00000020/weights: No such file or directory; " in said
    assert (
        "step-00000010/weights: expected 13 bytes, got 0. Name another one with --resume, or remove" in said
    )
    assert len(notes) == 2
    assert len(names_in(tmp_path)) == 3
    with pytest.raises(CheckpointError, match="expected a whole checkpoint: /nowhere is not there"):
        resumed(tmp_path, "/nowhere", notes)


def test_where_there_is_no_checkpoint_that_is_said(tmp_path: Path) -> None:
    notes: list[str] = []
    assert resumed(tmp_path / "mistyped", "auto", notes) is None
    assert notes == [f"no checkpoint in {tmp_path}/mistyped: beginning at the first step"]


def test_a_refused_training_leaves_what_another_one_is_writing(tmp_path: Path) -> None:
    saved(tmp_path, (10,))
    (tmp_path / ".step-00000020.unfinished").mkdir()
    for given, identity, problem in (
        (None, IDENTITY, "expected no checkpoints"),
        ("auto", {"seed": 6}, "seed 5, got 6"),
        ("auto", {**IDENTITY, "data_digest": "b"}, "that wrote it: the same tokens of data. Give"),
    ):
        with pytest.raises(ConfigurationError, match=problem):
            find_start(tmp_path, given, identity=identity, agree=agree, note=[].append)
    assert names_in(tmp_path) == [".step-00000020.unfinished", "step-00000010"]
    start = start_at(directory_of(tmp_path, 10))
    make_way(tmp_path, start=start, agreement=agree("resume"), note=[].append)
    assert names_in(tmp_path) == ["step-00000010"]
