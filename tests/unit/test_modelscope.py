"""ModelScope's part of the hub: a fake of its client, and the real one without a network."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from shardwise.checkpoint import cached_snapshot, download_snapshot, locate, snapshot_revision
from shardwise.errors import CheckpointError, MissingDependencyError
from tests.unit.hub_fakes import ONE, sharded


class FakeModelScope(types.ModuleType):
    def __init__(self, root: Path) -> None:
        super().__init__("modelscope")
        self.root = root / "models" / "org" / "name"
        self.files: dict[str, bytes] = {}
        self.calls: list[tuple[str | None, bool]] = []

    def snapshot_download(
        self,
        model_id: str,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        allow_patterns: list[str] | None = None,
    ) -> str:
        assert model_id == "org/name"
        self.calls.append((revision, local_files_only))
        if local_files_only:
            if not self.root.exists():
                raise ValueError("Cannot find the requested files in the cached path")
            return str(self.root)
        if not self.files:
            raise RuntimeError("no such model\nmore")
        self.root.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            if allow_patterns is None or any(fnmatchcase(name, pattern) for pattern in allow_patterns):
                (self.root / name).write_bytes(content)
        return str(self.root)


@pytest.fixture
def modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeModelScope:
    fake = FakeModelScope(tmp_path)
    monkeypatch.setitem(sys.modules, "modelscope", fake)
    return fake


def test_modelscope_downloads_the_same_files(modelscope: FakeModelScope) -> None:
    place = locate("ms://org/name")
    modelscope.files = {**sharded(), "pytorch_model.bin": b"x", "consolidated.safetensors": b"x"}
    assert cached_snapshot(place) is None
    path = download_snapshot(place)
    assert {item.name for item in path.iterdir()} == set(sharded())
    assert cached_snapshot(place) == path


def test_modelscopes_directory_names_no_commit(modelscope: FakeModelScope) -> None:
    place = locate("ms://org/name", revision="v1")
    modelscope.files = sharded()
    path = download_snapshot(place)
    assert snapshot_revision(path) == ""
    assert place.at(snapshot_revision(path)) == place
    assert {revision for revision, _ in modelscope.calls} == {"v1"}


def test_modelscopes_cache_cannot_answer_for_a_revision(modelscope: FakeModelScope) -> None:
    modelscope.files = sharded()
    download_snapshot(locate("ms://org/name"))
    assert cached_snapshot(locate("ms://org/name", revision="v1")) is None


def test_a_partial_modelscope_snapshot_is_none(modelscope: FakeModelScope) -> None:
    modelscope.files = sharded()
    path = download_snapshot(locate("ms://org/name"))
    (path / ONE).unlink()
    assert cached_snapshot(locate("ms://org/name")) is None


def test_modelscope_says_no(modelscope: FakeModelScope) -> None:
    with pytest.raises(CheckpointError) as caught:
        download_snapshot(locate("ms://org/name"))
    assert str(caught.value).startswith(
        "ms://org/name: expected a model on ModelScope, got none: no such model. Check the name"
    )


@pytest.mark.parametrize("function", [cached_snapshot, download_snapshot])
def test_modelscope_is_an_extra(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'shardwise\[modelscope\]'"):
        function(locate("ms://org/name"))


def test_the_real_client_finds_each_revision_in_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks look for the revision that the first one found: None would make each of them ask the hub."""
    pytest.importorskip("modelscope", minversion="1.40")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    snapshots = tmp_path / "models" / "org--name" / "snapshots"
    for revision in ("master", "v1"):
        (snapshots / revision).mkdir(parents=True)
        for name, content in sharded().items():
            (snapshots / revision / name).write_bytes(content)
    place = locate("ms://org/name")
    path = cached_snapshot(place)
    assert path == snapshots / "master"
    assert cached_snapshot(place.at(snapshot_revision(path))) == path
    assert cached_snapshot(place.at("v1")) == snapshots / "v1"
    assert cached_snapshot(place.at("v2")) is None
    (path / ONE).unlink()
    assert cached_snapshot(place) is None
