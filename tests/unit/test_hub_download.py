"""Which files of a hub are downloaded, and what its failures become."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from shardwise.checkpoint import (
    cached_snapshot,
    download_snapshot,
    locate,
    snapshot_revision,
)
from shardwise.errors import CheckpointError
from tests.unit.hub_fakes import INDEX, LOCATION, SHA, TWO, Cache, FakeHub, sharded

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
        (
            lambda: LocalEntryNotFoundError("Got: Cannot find it"),
            ["got neither: Cannot find it. HF_HUB_OFFLINE"],
        ),
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
