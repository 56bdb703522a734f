"""How a failed rank's message ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from shardwise.compare.failure import first_failure


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
    assert first_failure(ChildFailedError("run", {1: failed}), log_directory=tmp_path).message == shown
