"""What `from_pretrained` takes about hubs reaches the download, and secrets stay secret."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import shardwise as sw
from shardwise.checkpoint import HubAccess, cached_snapshot, download_snapshot, hub, locate
from shardwise.errors import CheckpointError, ConfigurationError
from shardwise.materialization import Agreement, open_source

SECRET = "hf_secret"
SHA = "0123456789abcdef0123456789abcdef01234567"


class Downloads:
    """In place of `snapshot_download`: keeps the arguments, and puts a small model where it is told to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def __call__(self, repo_id: str, **arguments: Any) -> str:
        self.calls.append({"repo_id": repo_id, **arguments})
        if self.error is not None:
            raise self.error
        snapshot = Path(arguments.get("cache_dir", self.root)) / "models--org--gated" / "snapshots" / SHA
        if arguments.get("local_files_only"):
            if not snapshot.is_dir():
                raise FileNotFoundError(str(snapshot))
            return str(snapshot)
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / "config.json").write_text("{}")
        (snapshot / "model.safetensors").write_bytes(save({"a": torch.ones(1)}))
        return str(snapshot)

    @property
    def fetched(self) -> list[dict[str, Any]]:
        """The calls that may use the network, without the patterns."""
        kept = [call for call in self.calls if not call.get("local_files_only")]
        return [{k: v for k, v in call.items() if k != "allow_patterns"} for call in kept]


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Downloads:
    fake = Downloads(tmp_path / "hub")
    monkeypatch.setattr(hub, "snapshot_download", fake)
    return fake


def opened(**arguments: Any) -> Path:
    access = HubAccess.from_arguments(arguments)
    agreement = Agreement((0,), timeout_seconds=20, call="test")
    return open_source("org/gated", agreement=agreement, access=access).path


def test_what_is_said_reaches_every_download(downloads: Downloads, tmp_path: Path) -> None:
    proxies = {"https": "http://user:pass@proxy"}
    path = opened(token=SECRET, cache_dir=tmp_path / "cache", proxies=proxies, force_download=True)
    assert path.is_relative_to(tmp_path / "cache")
    given = {
        "token": SECRET,
        "cache_dir": str(tmp_path / "cache"),
        "proxies": proxies,
        "force_download": True,
    }
    assert downloads.fetched == [
        {"repo_id": "org/gated", "revision": None, **given},
        {"repo_id": "org/gated", "revision": SHA, **given},
    ]


def test_what_is_not_said_is_left_to_the_library(downloads: Downloads) -> None:
    opened()
    assert all(set(call) == {"repo_id", "revision"} for call in downloads.fetched)
    assert len(downloads.fetched) == 2


def test_the_cache_is_looked_for_where_it_is(downloads: Downloads, tmp_path: Path) -> None:
    path = opened(cache_dir=tmp_path / "cache")
    downloads.calls.clear()
    assert opened(cache_dir=tmp_path / "cache") == path
    assert opened(cache_dir=tmp_path / "cache", local_files_only=True) == path
    assert downloads.fetched == []
    assert opened(cache_dir=tmp_path / "cache", force_download=True) == path
    assert len(downloads.fetched) == 2


def test_local_files_only_never_downloads(downloads: Downloads, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(local_files_only=True, cache_dir=tmp_path / "cache")
    assert f"org/gated: local_files_only=True: expected a complete snapshot in {tmp_path / 'cache'}" in str(
        caught.value
    )
    assert downloads.fetched == []


def test_a_token_is_nowhere_to_be_read(downloads: Downloads, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    access = HubAccess(token=SECRET, proxies={"https": "http://user:pass@proxy"})
    location = locate("org/gated", access=access)
    downloads.error = RuntimeError("no route to host")
    with pytest.raises(CheckpointError) as caught:
        download_snapshot(location)
    told = [str(caught.value), repr(location), str(access), caplog.text]
    assert not any(SECRET in text or "user:pass" in text for text in told)


def test_proxies_that_the_library_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(
        repo_id: str, *, revision: str | None, allow_patterns: list[str], token: str | None = None
    ) -> str:
        raise AssertionError("no download was expected")

    monkeypatch.setattr(hub, "snapshot_download", without)
    with pytest.raises(ConfigurationError, match="HTTPS_PROXY"):
        download_snapshot(locate("org/gated", access=HubAccess(proxies={"https": "x"})))


def test_modelscope_takes_a_cache_directory_and_refuses_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Modelscope:
        @staticmethod
        def snapshot_download(repo_id: str, **arguments: Any) -> str:
            calls.append(arguments)
            raise RuntimeError("nothing there")

    monkeypatch.setattr(hub, "_modelscope", lambda: Modelscope)
    place = locate("ms://org/gated", access=HubAccess(cache_dir="/cache"))
    assert cached_snapshot(place) is None
    with pytest.raises(CheckpointError, match="nothing there"):
        download_snapshot(place)
    assert [call["cache_dir"] for call in calls] == ["/cache", "/cache"]
    with pytest.raises(ConfigurationError, match="token: expected a model on the Hugging Face hub") as caught:
        download_snapshot(locate("ms://org/gated", access=HubAccess(token=SECRET)))
    assert SECRET not in str(caught.value)


def test_load_pretrained_passes_them_on(
    downloads: Downloads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from shardwise.strategies import pretrained

    downloads.error = RuntimeError("far enough")
    agreement = Agreement((0,), timeout_seconds=20, call="test")
    arguments = {"token": SECRET, "cache_dir": str(tmp_path), "force_download": True, "revision": "v1"}
    with pytest.raises(CheckpointError, match="far enough"):
        pretrained.load_deferred(
            AutoModelForCausalLM,
            "org/gated",
            dtype="auto",
            missing="error",
            config_kwargs=dict(arguments),
            direct_io=False,
            agreement=agreement,
        )
    assert downloads.fetched == [{"repo_id": "org/gated", **arguments}]
    assert sw.__version__


def test_numbered_files_of_many_stems_cost_no_more_than_one_list(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number}-00001-of-99999.safetensors").touch()
    missing = hub._missing(tmp_path)
    assert len(missing) == 99_998  # of the first stem: the others are not asked for
