"""The cyclic collector rests while plans are made, and comes back as it was."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import shardwise as sw
from shardwise.materialization import collector
from shardwise.materialization.collector import find_dropped, resting_collector


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


def test_what_it_has_not_counted_is_found_before_the_next_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "_VERY_MANY", 1000)
    gc.enable()
    gc.collect()
    with resting_collector():
        cycles = [Cycle() for _ in range(2000)]
    assert gc.get_count()[0] < 1000  # no walk over them is due
    gone = weakref.ref(cycles[0])
    del cycles
    gc.collect(1)
    assert gone() is not None
    sw.materialize(nn.Linear(1, 1, bias=False, device="meta"), {"weight": torch.ones(1, 1)})
    assert gone() is None


def test_few_objects_are_left_to_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.enable()
    find_dropped()
    with resting_collector():
        pass
    monkeypatch.setattr(gc, "collect", lambda: pytest.fail("walks every object of the process"))
    find_dropped()


class Cycle:
    def __init__(self) -> None:
        self.itself = self
