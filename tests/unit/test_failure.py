"""How a failed rank's message ends."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from shardwise.compare.failure import Failure, first_failure
from shardwise.compare.rank import record_whole


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("model.safetensors: cut short", "model.safetensors: cut short."),
        ("Get the file again.", "Get the file again."),
        ("Is this the checkpoint's directory?", "Is this the checkpoint's directory?"),
    ],
)
def test_a_message_ends_as_a_sentence_does(tmp_path: Path, said: str, shown: str) -> None:
    folder = tmp_path / "1"
    folder.mkdir()
    (folder / "error.json").write_text(json.dumps({"message": {"message": said}}))
    failed = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file="")
    error = ChildFailedError("run", {1: failed})
    assert first_failure(error, log_directory=tmp_path, unfinished=[1]).message == shown


LOST = "RankError: round 1 broke off: Connection closed by peer"


def found(directory: Path, said: dict[int, str], statuses: dict[int, int], *, ranks: int) -> Failure:
    for rank, text in said.items():
        (directory / str(rank)).mkdir()
        (directory / str(rank) / "error.json").write_text(json.dumps({"message": {"message": text}}))
    seen = {
        rank: ProcessFailure(local_rank=rank, pid=1, exitcode=status, error_file="")
        for rank, status in statuses.items()
    }
    return first_failure(ChildFailedError("run", seen), log_directory=directory, unfinished=range(ranks))


def test_a_rank_without_a_word_comes_before_one_that_only_tells_of_another(tmp_path: Path) -> None:
    # Rank 2 was stopped by the launcher; of rank 1's end it does not know yet.
    first = found(tmp_path, {0: LOST}, {0: 1, 2: -signal.SIGTERM}, ranks=3)
    assert first.rank == 1
    assert first.message.startswith("it ended without a word. Most often the machine ran out of memory")
    assert LOST in first.message


@pytest.mark.parametrize(
    ("said", "statuses", "expected"),
    [
        ({0: "ValueError: cut short"}, {0: 1}, (0, "ValueError: cut short.")),
        ({0: LOST}, {0: 1, 1: -signal.SIGTERM}, (0, f"{LOST}.")),
        ({0: LOST}, {0: 1, 1: -signal.SIGKILL}, (1, "it was ended by SIGKILL. ")),
        ({0: LOST}, {0: 1, 1: 7}, (1, "it left with status 7. ")),
        ({0: LOST, 1: "ValueError: cut short"}, {0: 1}, (1, "ValueError: cut short.")),
    ],
    ids=["says its own", "the other was stopped", "killed", "left", "both say"],
)
def test_who_is_named(
    tmp_path: Path, said: dict[int, str], statuses: dict[int, int], expected: tuple[int, str]
) -> None:
    first = found(tmp_path, said, statuses, ranks=2)
    assert (first.rank, first.message[: len(expected[1])]) == expected


def test_a_rank_that_is_stopped_while_it_writes_its_error_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with monkeypatch.context() as patched:

        def stopped(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(json, "dump", stopped)
        with pytest.raises(KeyboardInterrupt):
            record_whole(ValueError("layers.3: cut short"))
    assert not file.exists()
    assert os.environ["TORCHELASTIC_ERROR_FILE"] == str(file)
    record_whole(ValueError("layers.3: cut short"))
    assert json.loads(file.read_text())["message"]["message"] == "ValueError: layers.3: cut short"
    assert list(tmp_path.iterdir()) == [file]
