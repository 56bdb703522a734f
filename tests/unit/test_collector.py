"""The cyclic collector rests while plans are made, and comes back as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from shardwise.materialization.collector import resting_collector


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    was_enabled = gc.isenabled()
    yield
    (gc.enable if was_enabled else gc.disable)()


@pytest.mark.parametrize("enabled", [True, False])
def test_it_comes_back_as_it_was(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with resting_collector():
        assert not gc.isenabled()
        with resting_collector():
            pass
        assert not gc.isenabled()
    assert gc.isenabled() is enabled


def test_it_comes_back_after_an_error() -> None:
    gc.enable()
    with pytest.raises(KeyError), resting_collector():
        raise KeyError
    assert gc.isenabled()
