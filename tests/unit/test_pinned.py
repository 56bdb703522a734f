"""Pinned memory, with a driver that is not there."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardwise.materialization import pinned
from shardwise.materialization.pinned import PinnedMemory
from tests.unit.accelerator_fakes import DEVICE

NBYTES = 9 * 2**20 + 5  # no power of two, no whole number of pages


class Driver:
    """Notes what is registered; the first `refusals` calls fail."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.refuses = False

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 1
        if self.refuses:
            return 2
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        assert is_mapped(
            address, nbytes=self.registered[address]
        )  # else the address may be somebody else's by now
        del self.registered[address]
        return 0


def is_mapped(address: int, *, nbytes: int) -> bool:
    """Whether every page from an address on is there; of memory that is gone, others may have taken a part meanwhile."""
    for line in Path("/proc/self/maps").read_text().splitlines():  # in ascending order
        start, stop = (int(end, 16) for end in line.split()[0].split("-"))
        if start <= address < stop:
            nbytes, address = nbytes - (stop - address), stop
    return nbytes <= 0


def flags_of(address: int) -> list[str]:
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, stop = (int(end, 16) for end in first.split("-"))
            is_inside = start <= address < stop
        elif first == "VmFlags:" and is_inside:
            return rest
    return []


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(cudart=lambda: made))
    monkeypatch.setattr(pinned, "current", lambda _: torch.no_grad())
    return made


def memory() -> PinnedMemory:
    return PinnedMemory(NBYTES, device=DEVICE, threads=2, cpus=None)


def test_own_pages_are_registered_in_their_exact_size_and_given_back(driver: Driver) -> None:
    made = memory()
    assert driver.registered == {made.bytes.data_ptr(): NBYTES}
    assert len(made.bytes) == NBYTES
    held = made.bytes[:10]
    made.close()
    assert driver.registered == {}
    held.fill_(1)  # still memory
    made.close()


def test_it_is_unpinned_before_its_pages_go(driver: Driver) -> None:
    made = memory()
    address = made.bytes.data_ptr()
    assert is_mapped(address, nbytes=NBYTES)
    made.close()
    assert driver.registered == {}
    assert not is_mapped(address, nbytes=NBYTES)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTFORK"), reason="Linux has it")
def test_a_child_does_not_share_the_pages(driver: Driver) -> None:
    made = memory()
    assert "dc" in flags_of(made.bytes.data_ptr())  # proc(5), VmFlags: do not copy on fork


def test_memory_that_nobody_closes_is_given_back_with_its_owner(driver: Driver) -> None:
    made = memory()
    assert driver.registered
    del made
    assert driver.registered == {}


@pytest.mark.parametrize("is_public", [True, False])
def test_where_the_driver_refuses_torch_allocates(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, is_public: bool
) -> None:
    driver.refuses = True
    empty, asked = torch.empty, []

    def pinning(*sizes: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        asked.append((sizes, pin_memory))
        return empty(*sizes, **options)

    def zeros(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: the one that was left")

    monkeypatch.setattr(torch, "empty", pinning)
    monkeypatch.setattr(torch, "zeros", zeros)
    emptied: list[bool] = []
    monkeypatch.delattr(torch.accelerator, "empty_host_cache", raising=False)
    if is_public:
        monkeypatch.setattr(
            torch.accelerator, "empty_host_cache", lambda: emptied.append(True), raising=False
        )
    else:
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: emptied.append(True), raising=False)
    made = memory()
    assert asked == [((NBYTES,), True)]
    made.close()
    assert driver.registered == {}
    assert emptied == [True]  # torch would keep it


def test_a_device_without_such_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace())
    monkeypatch.setattr(pinned, "current", lambda _: torch.no_grad())
    asked = []
    monkeypatch.setattr(
        torch, "empty", lambda *sizes, **options: asked.append((sizes, options["pin_memory"]))
    )
    memory()
    assert asked == [((NBYTES,), True)]
