"""Snapshots of hub checkpoints, in a cache of the hub's layout that is made by hand. Nothing reaches for a network."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save

from shardwise.checkpoint import (
    SafetensorsSource,
    cached_snapshot,
    download_snapshot,
    hub,
    locate,
    snapshot_revision,
)
from shardwise.errors import CheckpointError, DamagedFileError, MissingDependencyError

SHA = "0123456789abcdef0123456789abcdef01234567"
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
LOCATION = locate("org/name")


def sharded() -> dict[str, bytes]:
    return {
        "config.json": b"{}",
        INDEX: json.dumps({"weight_map": {"a": ONE, "b": TWO}}).encode(),
        ONE: save({"a": torch.ones(3)}),
        TWO: save({"b": torch.zeros(2)}),
    }


class Cache:
    """The cache directory of huggingface_hub: blobs, and snapshots that consist of relative links to them."""

    def __init__(self, root: Path) -> None:
        self.repository = root / "models--org--name"

    def add(self, files: Mapping[str, bytes], *, sha: str = SHA, ref: str | None = "main") -> Path:
        snapshot = self.repository / "snapshots" / sha
        for name, content in files.items():
            blob = self.repository / "blobs" / hashlib.sha256(content).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link = snapshot / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                up = "../" * (2 + name.count("/"))
                link.symlink_to(f"{up}blobs/{blob.name}")
        if ref is not None:
            (self.repository / "refs").mkdir(parents=True, exist_ok=True)
            (self.repository / "refs" / ref).write_text(sha)
        return snapshot

    def add_listing(self, names: list[str], *, sha: str = SHA) -> None:
        """Write what huggingface_hub 2 keeps of a repository's list of files; earlier releases have none."""
        path = self.repository / "trees" / f"{sha}.json"
        path.parent.mkdir(parents=True)
        files = {name: {"size": 1, "blob_id": "0" * 40} for name in names}
        path.write_text(json.dumps({"format_version": 1, "files": files}))


class FakeHub:
    """In place of `snapshot_download`: downloads from a dictionary into the cache, or fails."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.files: dict[str, bytes] = {}
        self.error: Exception | None = None
        self.calls: list[tuple[str | None, tuple[str, ...]]] = []

    def __call__(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool = False
    ) -> str:
        if local_files_only:
            return huggingface_hub.snapshot_download(
                repo_id, revision=revision, allow_patterns=allow_patterns, local_files_only=True
            )
        assert repo_id == "org/name"
        self.calls.append((revision, tuple(allow_patterns)))
        if self.error is not None:
            raise self.error
        wanted = {n: c for n, c in self.files.items() if any(fnmatchcase(n, p) for p in allow_patterns)}
        return str(self.cache.add(wanted))

    @property
    def downloaded(self) -> set[str]:
        snapshot = self.cache.repository / "snapshots" / SHA
        return {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_symlink()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return Cache(tmp_path)


@pytest.fixture
def fake_hub(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(cache)
    monkeypatch.setattr(hub, "snapshot_download", fake)
    return fake


# --- what is on this machine ---


def test_a_complete_snapshot_is_found_and_its_links_are_read(cache: Cache) -> None:
    snapshot = cache.add(sharded())
    assert cached_snapshot(LOCATION) == snapshot
    source = SafetensorsSource.open(snapshot)
    assert set(source.tensors) == {"a", "b"}
    stored, content = source.tensors["a"], bytearray(12)
    source.read_into(stored.file, stored.start, memoryview(content))
    source.close()
    assert torch.equal(torch.frombuffer(content, dtype=torch.float32), torch.ones(3))


def test_one_file_needs_no_index(cache: Cache) -> None:
    snapshot = cache.add({"config.json": b"{}", "model.safetensors": save({"a": torch.ones(1)})})
    assert cached_snapshot(LOCATION) == snapshot


def test_nothing_cached(cache: Cache) -> None:
    assert cached_snapshot(LOCATION) is None


@pytest.mark.parametrize("lacking", [ONE, TWO, INDEX, "config.json"])
def test_a_partial_snapshot_is_none(cache: Cache, lacking: str) -> None:
    files = sharded()
    del files[lacking]
    cache.add(files)
    if lacking == INDEX:  # both numbered files together are complete without it
        (cache.repository / "snapshots" / SHA / TWO).unlink()
    assert cached_snapshot(LOCATION) is None


def test_a_snapshot_with_descriptions_only_is_none(cache: Cache) -> None:
    cache.add({"config.json": b"{}"})
    assert cached_snapshot(LOCATION) is None


def test_a_link_without_its_blob_is_none(cache: Cache) -> None:
    snapshot = cache.add(sharded())
    (snapshot / TWO).resolve().unlink()
    assert (snapshot / TWO).is_symlink()
    assert cached_snapshot(LOCATION) is None


def test_files_that_no_load_needs_may_be_missing(cache: Cache) -> None:
    snapshot = cache.add(sharded())
    cache.add_listing([*sharded(), "tokenizer.json", "consolidated.safetensors"])
    assert cached_snapshot(LOCATION) == snapshot


def test_a_listed_weight_file_that_is_missing_is_none(cache: Cache) -> None:
    files = sharded()
    del files[TWO]
    cache.add(files)
    cache.add_listing([*sharded()])
    assert cached_snapshot(LOCATION) is None


def test_a_damaged_index_is_an_error(cache: Cache) -> None:
    cache.add({**sharded(), INDEX: b"{"})
    with pytest.raises(DamagedFileError, match="expected an index in JSON"):
        cached_snapshot(LOCATION)


def test_the_revision_decides(cache: Cache) -> None:
    other = "f" * 40
    new, old = cache.add(sharded()), cache.add(sharded(), sha=other, ref="v1")
    assert cached_snapshot(LOCATION) == new
    assert cached_snapshot(locate("org/name", revision="v1")) == old
    assert cached_snapshot(LOCATION.at(other)) == old
    assert cached_snapshot(locate("org/name", revision="v2")) is None


def test_ranks_pin_the_commit_of_the_first(cache: Cache) -> None:
    path = cached_snapshot(LOCATION) or cache.add(sharded())
    pinned = LOCATION.at(snapshot_revision(path))
    assert pinned.revision == SHA
    cache.add(sharded(), sha="e" * 40)  # meanwhile, main has moved
    assert cached_snapshot(pinned) == path
    assert cached_snapshot(LOCATION) != path


def test_a_subfolder(cache: Cache) -> None:
    snapshot = cache.add({f"unet/{name}": content for name, content in sharded().items()})
    assert cached_snapshot(LOCATION, subfolder="unet") == snapshot
    assert cached_snapshot(LOCATION) is None


# --- downloads ---


def test_only_what_the_index_names_is_downloaded(fake_hub: FakeHub) -> None:
    fake_hub.files = {
        **sharded(),
        "README.md": b"x",
        "pytorch_model.bin": b"x",
        "tf_model.h5": b"x",
        "flax_model.msgpack": b"x",
        "consolidated.safetensors": b"x",
        "original/model.safetensors": b"x",
        "modeling_name.py": b"",
    }
    path = download_snapshot(LOCATION)
    assert fake_hub.downloaded == {*sharded(), "modeling_name.py"}
    assert cached_snapshot(LOCATION) == path
    assert snapshot_revision(path) == SHA


def test_the_weights_are_those_of_the_commit_of_the_index(fake_hub: FakeHub) -> None:
    fake_hub.files = sharded()
    download_snapshot(locate("org/name", revision="main"))
    assert [revision for revision, _ in fake_hub.calls] == ["main", SHA]


def test_without_an_index_every_safetensors_file_is_downloaded(fake_hub: FakeHub) -> None:
    fake_hub.files = {"config.json": b"{}", "model.safetensors": b"x", "pytorch_model.bin": b"x"}
    download_snapshot(LOCATION)
    assert fake_hub.downloaded == {"config.json", "model.safetensors"}


def test_names_in_an_index_are_not_patterns(fake_hub: FakeHub) -> None:
    index = json.dumps({"weight_map": {"a": "[ab].safetensors"}}).encode()
    fake_hub.files = {INDEX: index, "[ab].safetensors": b"x", "a.safetensors": b"x"}
    download_snapshot(LOCATION)
    assert fake_hub.downloaded == {INDEX, "[ab].safetensors"}


def test_a_subfolder_is_downloaded_alone(fake_hub: FakeHub) -> None:
    fake_hub.files = {**sharded(), "unet/model.safetensors": b"x", "unet/config.json": b"{}"}
    path = download_snapshot(LOCATION, subfolder="unet")
    assert fake_hub.downloaded == {"config.json", INDEX, "unet/model.safetensors", "unet/config.json"}
    assert cached_snapshot(LOCATION, subfolder="unet") == path


def test_a_subfolder_that_was_not_named_is_downloaded_too(fake_hub: FakeHub) -> None:
    fake_hub.files = {"unet/model.safetensors": b"x", "unet/config.json": b"{}"}
    download_snapshot(LOCATION)
    assert fake_hub.downloaded == set(fake_hub.files)


def test_an_index_that_leads_out_of_the_snapshot_is_refused(fake_hub: FakeHub) -> None:
    fake_hub.files = {INDEX: json.dumps({"weight_map": {"a": "../../x.safetensors"}}).encode()}
    with pytest.raises(CheckpointError, match="expected the name of a file inside"):
        download_snapshot(LOCATION)


def test_a_model_with_pickle_files_only(fake_hub: FakeHub) -> None:
    fake_hub.files = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(CheckpointError) as caught:
        download_snapshot(LOCATION)
    assert "org/name: expected safetensors files in " in str(caught.value)
    assert "got none of model.safetensors (1 missing)" in str(caught.value)
    assert "load_pretrained(defer=False)" in str(caught.value)


def test_a_download_that_left_files_out(fake_hub: FakeHub) -> None:
    # Without a network huggingface_hub before 2.0 returns the folder as it is.
    fake_hub.files = sharded()
    del fake_hub.files[TWO]
    with pytest.raises(CheckpointError, match=rf"got none of {TWO} \(1 missing\). If the network failed"):
        download_snapshot(LOCATION)


def refused(kind: type[HfHubHTTPError], text: str) -> HfHubHTTPError:
    response: Any = types.SimpleNamespace(headers={}, request=None, status_code=401, url="", reason="")
    return kind(f"{text}\nmore lines\nof no use", response=response)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            lambda: refused(GatedRepoError, "403 Client Error."),
            ["got a gated one: 403 Client Error. Accept its terms", "hf auth login"],
        ),
        (
            lambda: refused(RepositoryNotFoundError, "401 Client Error."),
            ["got neither: 401 Client Error. Check the name; for a private model, log in"],
        ),
        (
            lambda: refused(RevisionNotFoundError, "404 Client Error"),
            ["got one without a revision None: 404 Client Error. Check the revision"],
        ),
        (lambda: LocalEntryNotFoundError("Cannot find it"), ["got neither: Cannot find it. HF_HUB_OFFLINE"]),
    ],
    ids=["gated", "not found", "revision", "offline"],
)
def test_what_the_hub_says_in_one_sentence(
    fake_hub: FakeHub, error: Callable[[], Exception], expected: list[str]
) -> None:
    fake_hub.error = error()
    with pytest.raises(CheckpointError) as caught:
        download_snapshot(LOCATION)
    message = str(caught.value)
    assert message.startswith("org/name: expected a directory or file, or a model on the hub, got ")
    for text in expected:
        assert text in message
    assert "of no use" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


class ProxyError(Exception):
    """As of an HTTP client: of no base that huggingface_hub names."""


@pytest.mark.parametrize(
    "error", [ProxyError("the proxy\nsays no"), OSError(28, "No space left"), ProxyError()]
)
def test_any_other_failure_keeps_its_cause(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fake_hub.error = error
    with pytest.raises(CheckpointError) as caught:
        download_snapshot(LOCATION)
    assert caught.value.__cause__ is error
    assert "Check the name, the network (HF_ENDPOINT), the disk (HF_HUB_CACHE)" in str(caught.value)
    assert "says no" not in str(caught.value)


def test_offline_with_the_real_client(cache: Cache) -> None:
    with pytest.raises(CheckpointError) as caught:
        download_snapshot(LOCATION)
    assert "HF_HUB_OFFLINE is set: download the model where there is a network (hf download org/name)" in str(
        caught.value
    )
    cache.add(sharded())
    assert download_snapshot(LOCATION) == cached_snapshot(LOCATION)


def test_offline_and_partial_with_the_real_client(cache: Cache) -> None:
    files = sharded()
    del files[TWO]
    cache.add(files)
    with pytest.raises(CheckpointError, match=TWO):
        download_snapshot(LOCATION)


# --- ModelScope ---


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
