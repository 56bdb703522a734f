"""Extents are read one ahead, into two buffers, and an error arrives where the bytes are wanted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from shardwise.checkpoint import StateDictSource
from shardwise.errors import CheckpointError, PeerError
from shardwise.materialization import Agreement
from shardwise.materialization.awaited_source import awaited
from shardwise.materialization.read_ahead import ReadAhead
from shardwise.plan import Extent, Slice

EXTENTS = [Extent(file="w", start=at, stop=at + 64, slices=2) for at in (0, 64, 128)]


def slice_at(start: int) -> Slice:
    return Slice(file="w", start=start, stop=start + 32, units=())


class Recording(StateDictSource):
    """Notes where it is read, and waits, fails, or both."""

    def __init__(self) -> None:
        super().__init__({"w": torch.arange(192, dtype=torch.uint8)})
        self.read_at: list[int] = []
        self.fails_at: int | None = None
        self.may_read = threading.Event()
        self.may_read.set()

    def read_into(self, file: str, offset: int, into: memoryview) -> None:
        self.may_read.wait(30)
        self.read_at.append(offset)
        if offset == self.fails_at:
            raise CheckpointError("w: broken")
        super().read_into(file, offset, into)


@contextmanager
def read_ahead(
    source: Recording, *, check: Callable[[], None] | None = None, done: list[int] | None = None
) -> Iterator[ReadAhead]:
    alone = Agreement((0,), timeout_seconds=60.0, call="materialize")
    if check is not None:
        alone.check = check  # type: ignore[method-assign,assignment]
    with awaited(source, alone, name="memory") as bounded:
        yield ReadAhead(
            EXTENTS, source=bounded, pinned_for=None, done=(done if done is not None else []).append
        )


def test_slices_come_in_order_out_of_extents_that_are_read_once() -> None:
    source, done = Recording(), []
    with read_ahead(source, done=done) as ahead:
        for start in range(0, 192, 32):
            assert ahead.content_of(slice_at(start)).tolist() == list(range(start, start + 32))
    assert source.read_at == [0, 64, 128]
    assert done == [64, 64, 64]


def test_the_next_extent_is_read_while_one_is_in_use_and_no_further_one() -> None:
    source = Recording()
    with read_ahead(source) as ahead:
        content = ahead.content_of(slice_at(0))
        deadline = time.monotonic() + 30
        while len(source.read_at) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert source.read_at == [0, 64]
    assert content.tolist() == list(range(32))  # the read ahead has another buffer


def test_an_error_of_a_read_ahead_arrives_with_its_slice() -> None:
    source = Recording()
    source.fails_at = 64
    with read_ahead(source) as ahead:
        ahead.content_of(slice_at(0))
        ahead.content_of(slice_at(32))
        with pytest.raises(CheckpointError, match="broken"):
            ahead.content_of(slice_at(64))


def test_a_failed_rank_is_heard_of_while_a_read_is_awaited() -> None:
    source = Recording()
    source.may_read.clear()

    def check() -> None:
        source.may_read.set()  # so that the read can end, which leaving waits for
        raise PeerError("rank 1 failed")

    before = set(threading.enumerate())
    with pytest.raises(PeerError), read_ahead(source, check=check) as ahead:
        ahead.content_of(slice_at(0))
    assert set(threading.enumerate()) <= before
