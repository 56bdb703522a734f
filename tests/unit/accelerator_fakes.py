"""An accelerator that is not there: its memory is the host's, and its streams are a list of what was done on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from shardwise.materialization import device_placing, staging

DEVICE = torch.device("cuda", 3)  # any accelerator's: nothing here depends on the kind
HOST = torch.device("cpu")  # tensors "on the device" of these tests


class FakeEvent:
    """Notes who waits for it."""

    def __init__(self, accelerator: FakeAccelerator, name: str) -> None:
        self.accelerator = accelerator
        self.name = name

    def synchronize(self) -> None:
        self.accelerator.log.append(f"host waits for {self.name}")


class FakeStream:
    """Notes what it is told."""

    accelerator: FakeAccelerator

    def __init__(self, device: Any = None, name: str = "") -> None:
        self.device = device
        self.accelerator.streams += not name
        self.name = name or f"lane {self.accelerator.streams}"
        self.events = 0

    def wait_stream(self, other: FakeStream) -> None:
        self.accelerator.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> FakeEvent:
        self.events += 1
        event = FakeEvent(self.accelerator, f"event {self.events} of {self.name}")
        self.accelerator.log.append(event.name)
        return event

    def synchronize(self) -> None:
        self.accelerator.log.append(f"host waits for {self.name}")


class FakePinned:
    """Counts what is pinned."""

    accelerator: FakeAccelerator

    def __init__(self, nbytes: int, *, device: torch.device, threads: int, cpus: object) -> None:
        self.bytes = torch.empty(nbytes, dtype=torch.uint8)
        self.accelerator.pinned.append(nbytes)
        self.nbytes = nbytes

    def close(self) -> None:
        self.accelerator.pinned.remove(self.nbytes)
        self.accelerator.log.append("unpinned")


class FakeAccelerator:
    """What has happened.

    Attributes:
        log: In order.
        pinned: Bytes that are pinned at the moment.
        streams: Made.
        travelled_bytes: From the host.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pinned: list[int] = []
        self.streams = 0
        self.travelled_bytes = 0


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    made = FakeAccelerator()
    FakeStream.accelerator = FakePinned.accelerator = made
    main = FakeStream(name="current stream")

    @contextmanager
    def on_stream(stream: FakeStream) -> Iterator[None]:
        made.log.append(f"on {stream.name}")
        yield
        made.log.append("off")

    copy = torch.Tensor.copy_

    def copied(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        made.log += ["host to device"] * non_blocking
        made.travelled_bytes += self.nbytes * non_blocking
        return copy(self, source, non_blocking)

    foreach = torch._foreach_copy_

    def placed(places: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        made.log.append(f"place {len(places)}")
        foreach(places, values)

    monkeypatch.setattr(torch, "Stream", FakeStream)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(torch, "_foreach_copy_", placed)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda *_: main)
    monkeypatch.setattr(device_placing, "on_stream", on_stream)
    monkeypatch.setattr(staging, "PinnedMemory", FakePinned)
    monkeypatch.setattr(staging, "cpus_near", lambda _: None)
    return made
