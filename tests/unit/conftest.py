"""Fixtures of the tests that need a hub, and of those that read this process's memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from shardwise.checkpoint import hub
from tests.unit.hub_fakes import Cache, FakeHub


@pytest.fixture(scope="module")
def nothing_is_collected() -> Iterator[None]:
    """What earlier tests have left goes now, and not between two readings of memory."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return Cache(tmp_path)


@pytest.fixture
def fake_hub(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(cache)
    monkeypatch.setattr(hub, "snapshot_download", fake)
    return fake
