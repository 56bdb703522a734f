"""Fixtures of the tests that need a hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from shardwise.checkpoint import hub
from tests.unit.hub_fakes import Cache, FakeHub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return Cache(tmp_path)


@pytest.fixture
def fake_hub(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(cache)
    monkeypatch.setattr(hub, "snapshot_download", fake)
    return fake
