"""The ring of staging buffers, on an accelerator that is not there: its events and pinned memory are fakes."""

from __future__ import annotations

import mmap

import pytest
import torch

from shardwise.errors import ConfigurationError
from shardwise.materialization.staging import StagingRing, default_staging_bytes, read_bytes_of, ring_shape
from tests.unit.accelerator_fakes import DEVICE, FakeAccelerator, FakeEvent
from tests.unit.accelerator_fakes import accelerator as accelerator

MEBIBYTE = 2**20


def event(accelerator: FakeAccelerator, name: str) -> torch.Event:
    made: torch.Event = FakeEvent(accelerator, name)  # type: ignore[assignment]
    return made


def test_all_buffers_are_pinned_at_once_in_their_exact_size(accelerator: FakeAccelerator) -> None:
    ring = StagingRing(count=3, nbytes=80, device=DEVICE)
    assert accelerator.pinned == []
    buffers = [ring.take() for _ in range(3)]
    assert accelerator.pinned == [240]
    assert {buffer.untyped_storage().data_ptr() for buffer in buffers} == {
        buffers[0].untyped_storage().data_ptr()
    }
    assert [buffer.storage_offset() for buffer in buffers] == [0, 80, 160]


def test_a_buffer_comes_again_when_the_copies_out_of_it_are_done(accelerator: FakeAccelerator) -> None:
    ring = StagingRing(count=2, nbytes=64, device=DEVICE)
    first, second = ring.take(), ring.take()
    assert not ring.available
    ring.give_back(second, copied=event(accelerator, "second"))
    ring.give_back(first, copied=event(accelerator, "first"))
    assert ring.available
    assert accelerator.log == []
    assert ring.take() is second  # the one whose copies were started first
    assert accelerator.log == ["host waits for second"]
    assert ring.take() is first
    assert accelerator.log == ["host waits for second", "host waits for first"]


def test_a_buffer_without_copies_comes_before_one_that_is_copied(accelerator: FakeAccelerator) -> None:
    ring = StagingRing(count=2, nbytes=64, device=DEVICE)
    first, second = ring.take(), ring.take()
    ring.give_back(first, copied=event(accelerator, "first"))
    ring.give_back(second)
    assert ring.take() is second
    assert accelerator.log == []


def test_closing_waits_for_all_copies_and_then_unpins(accelerator: FakeAccelerator) -> None:
    ring = StagingRing(count=3, nbytes=64, device=DEVICE)
    for number in range(3):
        ring.give_back(ring.take(), copied=event(accelerator, f"{number}"))
    ring.close()
    assert accelerator.log[-1] == "unpinned"
    assert accelerator.pinned == []
    assert {"host waits for 0", "host waits for 1", "host waits for 2"} <= set(accelerator.log)
    ring.close()


def test_on_the_cpu_nothing_is_pinned(accelerator: FakeAccelerator) -> None:
    ring = StagingRing(count=1, nbytes=64, device=torch.device("cpu"))
    buffer = ring.take()
    assert not ring.available
    ring.give_back(buffer)
    assert ring.take() is buffer
    ring.close()
    assert accelerator.pinned == accelerator.log == []


@pytest.mark.parametrize(
    "staging_bytes", [16, 100, 4096, 100_000, MEBIBYTE, 24 * MEBIBYTE, 64 * MEBIBYTE, 256 * MEBIBYTE, 2**32]
)
def test_chunks_fit_into_staging_and_are_of_a_useful_size(staging_bytes: int) -> None:
    shape = ring_shape(staging_bytes, on_host=False, environ={})
    assert shape.count >= 2
    assert shape.count * shape.nbytes <= max(staging_bytes, 2 * 16)
    assert shape.nbytes >= min(8 * MEBIBYTE, staging_bytes // 4 - mmap.PAGESIZE)
    assert shape.nbytes <= 32 * MEBIBYTE
    assert shape.nbytes % mmap.PAGESIZE == 0 or shape.nbytes < 2 * mmap.PAGESIZE
    # What is read in host memory after all, where a file cannot be mapped, fits too.
    host = ring_shape(staging_bytes, on_host=True, environ={"SHARDWISE_CHUNK_BYTES": "1"})
    assert host.nbytes == read_bytes_of(staging_bytes)


def test_the_default_ring_of_an_accelerator() -> None:
    shape = ring_shape(default_staging_bytes("cuda"), on_host=False, environ={})
    assert (shape.count, shape.nbytes) == (16, 16 * MEBIBYTE)


def test_the_chunk_can_be_chosen() -> None:
    environ = {"SHARDWISE_CHUNK_BYTES": str(8 * MEBIBYTE)}
    shape = ring_shape(256 * MEBIBYTE, on_host=False, environ=environ)
    assert (shape.count, shape.nbytes) == (32, 8 * MEBIBYTE)
    for text in ("0", "-1", "8MiB", "15", str(129 * MEBIBYTE)):
        with pytest.raises(ConfigurationError, match="SHARDWISE_CHUNK_BYTES: expected"):
            ring_shape(256 * MEBIBYTE, on_host=False, environ={"SHARDWISE_CHUNK_BYTES": text})
