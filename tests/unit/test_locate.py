"""What a user's text for a checkpoint means."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardwise.checkpoint import HubAccess, Location, locate
from shardwise.errors import CheckpointError


def test_a_directory_and_a_file_are_local(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.touch()
    for place in (tmp_path, file):
        found = locate(place, revision="v1")
        assert found == Location(
            name=str(place), kind="local", path=place, repo_id="", revision=None, access=HubAccess()
        )
        assert locate(str(place)).path == place


def test_a_link_to_a_file_is_local(tmp_path: Path) -> None:
    (tmp_path / "blob").touch()
    (tmp_path / "x.safetensors").symlink_to("blob")
    assert locate(tmp_path / "x.safetensors").path == tmp_path / "x.safetensors"


@pytest.mark.parametrize("name", ["gpt2", "org/name", "org/name-1.5_b"])
def test_what_is_not_here_is_a_hub_id(name: str) -> None:
    found = locate(name, revision="v1")
    assert (found.kind, found.repo_id, found.path, found.revision) == ("hub", name, None, "v1")
    assert found.name == name


def test_a_directory_wins_over_a_hub_id_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert locate("org/other").kind == "hub"
    monkeypatch.chdir(tmp_path)
    assert locate("org/name").kind == "local"
    assert locate("org/other").kind == "hub"


def test_a_modelscope_id() -> None:
    found = locate("ms://org/name", revision="v1")
    assert (found.kind, found.repo_id, found.revision) == ("modelscope", "org/name", "v1")
    assert found.name == "ms://org/name"


@pytest.mark.parametrize(
    "text", ["ms://", "ms://name", "ms://a/b/c", "ms://../name", "ms://org/..", "ms://org/a..b", "ms://o r/g"]
)
def test_what_modelscope_has_no_name_for(text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        locate(text)
    assert str(caught.value).startswith(f"{text}: expected ms://OWNER/NAME, got ")
    assert "Copy the id from the model's page" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why_not_local", "why_not_hub"),
    [
        ("/no/such/path", "No such file or directory", "Repo id must"),
        ("./gone", "No such file or directory", "Repo id must"),
        ("../gone", "No such file or directory", "Repo id must"),
        ("a/b/c", "No such file or directory", "Repo id must be in the form"),
        ("~/models/x", "No such file or directory", "begins with ~"),
        ("gone.safetensors", "No such file or directory", "ends like a file name"),
        ("org/pytorch_model.bin", "No such file or directory", "ends like a file name"),
        ("with space", "No such file or directory", "Repo id must"),
        ("a--b", "No such file or directory", "Cannot have -- or .."),
        ("", "No such file or directory", "Repo id must"),
        ("a\0b", "null", "Repo id must"),
        ("n" * 300, "File name too long", "Repo id must"),
    ],
)
def test_an_error_says_that_both_were_tried(text: str, why_not_local: str, why_not_hub: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        locate(text)
    message = str(caught.value)
    assert message.startswith(
        f"{text!r}: expected a directory, a file or a hub id, got a path that does not exist"
    )
    assert why_not_local in message
    assert why_not_hub in message.partition("cannot be a hub id (")[2]
    assert os.getcwd() in message
    assert "NAME or OWNER/NAME" in message


def test_a_path_object_is_never_a_hub_id() -> None:
    # Path("./gone") is Path("gone"): as text it would be looked for on the hub.
    with pytest.raises(CheckpointError, match="it is a path object; pass a hub id as text"):
        locate(Path("./gone"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="expected a directory or a regular file, got another kind"):
        locate(tmp_path / "pipe")


def test_one_commit_of_a_place() -> None:
    place = locate("org/name", revision="main")
    assert place.at("0" * 40) == Location(
        name="org/name", kind="hub", path=None, repo_id="org/name", revision="0" * 40, access=HubAccess()
    )
    assert place.at("") == place
