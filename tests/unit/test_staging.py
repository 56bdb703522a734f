"""The ring of staging buffers, on an accelerator that is not there: its events and streams are fakes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from shardwise.materialization.staging import StagingRing

DEVICE = torch.device("cuda", 3)  # any accelerator's: nothing here depends on the kind


class Accelerator:
    """Streams with a list of what was done on them, and pinned memory."""

    def __init__(self) -> None:
        self.index = 0  # the current device is another one
        self.pinned_on: list[int] = []
        self.recorded_on: list[Any] = []
        self.waited: list[FakeEvent] = []

    def current_stream(self, device: torch.device | None = None) -> str:
        return f"stream of {self.index if device is None else device.index}"

    @contextmanager
    def device_index(self, index: int) -> Iterator[None]:
        before, self.index = self.index, index
        try:
            yield
        finally:
            self.index = before


class FakeEvent:
    accelerator: Accelerator

    def __init__(self, device: torch.device) -> None:
        assert device == DEVICE

    def record(self, stream: Any = None) -> None:
        self.accelerator.recorded_on.append(stream or self.accelerator.current_stream())

    def synchronize(self) -> None:
        self.accelerator.waited.append(self)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    made = Accelerator()
    FakeEvent.accelerator = made
    empty = torch.empty

    def pinned(*sizes: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            made.pinned_on.append(made.index)
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "Event", FakeEvent)
    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.accelerator, "current_stream", made.current_stream)
    monkeypatch.setattr(torch.accelerator, "device_index", made.device_index)
    return made


def test_events_are_recorded_where_the_copies_run(accelerator: Accelerator) -> None:
    ring = StagingRing(count=2, nbytes=64, device=DEVICE)
    ring.give_back(ring.take())
    assert accelerator.recorded_on == ["stream of 3"]  # and not on the current device's
    assert accelerator.pinned_on == [3]
    assert accelerator.index == 0


def test_a_buffer_comes_again_when_the_copies_out_of_it_are_done(accelerator: Accelerator) -> None:
    ring = StagingRing(count=2, nbytes=64, device=DEVICE)
    first, second = ring.take(), ring.take()
    assert not ring.available
    ring.give_back(second)
    ring.give_back(first)
    assert ring.available
    assert accelerator.waited == []
    assert ring.take() is second  # the one whose copies were started first
    assert len(accelerator.waited) == 1
    assert ring.take() is first
    assert len(accelerator.waited) == 2
    assert len(accelerator.pinned_on) == 2


def test_draining_waits_for_all_copies(accelerator: Accelerator) -> None:
    ring = StagingRing(count=3, nbytes=64, device=DEVICE)
    for buffer in [ring.take() for _ in range(3)]:
        ring.give_back(buffer)
    ring.drain()
    assert len(accelerator.waited) == 3
    ring.take()
    assert len(accelerator.waited) == 3
    assert len(accelerator.pinned_on) == 3


def test_on_the_cpu_nothing_is_pinned_or_waited_for(accelerator: Accelerator) -> None:
    ring = StagingRing(count=1, nbytes=64, device=torch.device("cpu"))
    buffer = ring.take()
    assert not ring.available
    ring.give_back(buffer)
    assert ring.take() is buffer
    ring.drain()
    assert accelerator.pinned_on == accelerator.recorded_on == accelerator.waited == []
