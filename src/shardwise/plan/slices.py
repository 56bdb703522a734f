"""What the ranks read in an exchange, and hand out slice by slice.

There may be millions of slices. They are kept as arrays, and become objects one by one, when they are carried out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from shardwise.plan.strips import Strip, Taker

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A run of a strip's elements.

    Args:
        strip: That it is a part of.
        low: First element of the stored tensor, inclusive.
        high: Last element, exclusive.
    """

    strip: Strip
    low: int
    high: int

    @property
    def takers(self) -> tuple[Taker, ...]:
        """Who takes what of the whole stored tensor."""
        return self.strip.takers

    @property
    def is_whole(self) -> bool:
        """Whether it is all that anybody takes of the stored tensor."""
        return self.strip.is_whole and (self.low, self.high) == (self.strip.low, self.strip.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What one rank reads and hands out in one round: units that follow each other in one file."""

    file: str
    start: int
    stop: int
    units: tuple[Unit, ...]

    @property
    def nbytes(self) -> int:
        """Bytes read."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Slices of one reader that follow each other in one file, and are read at once.

    Args:
        file: Within the source.
        start: First byte, inclusive.
        stop: Last byte, exclusive.
        slices: How many.
    """

    file: str
    start: int
    stop: int
    slices: int

    @property
    def nbytes(self) -> int:
        """Bytes read."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, eq=False)
class Slices:
    """All slices of an exchange, and which rank reads which in which round.

    Args:
        strips: In file order.
        readers: Number of ranks that read.
        strip: Of each slice: the first of its strips, by index.
        element: Of each slice: its first element, counted from the start of that strip.
        start: Of each slice: first byte in the file.
        stop: Of each slice: last byte in the file, exclusive.
        reader: Of each slice: position among the readers.
        extent: Of each slice: which of equal parts of everything it belongs to, in order.
        most_sent_bytes: Of one slice by its reader, at most.
        most_received_bytes: By one rank in one round, at most.
    """

    strips: list[Strip]
    readers: int
    strip: Counts
    element: Counts
    start: Counts
    stop: Counts
    reader: Counts
    extent: Counts
    most_sent_bytes: int
    most_received_bytes: int = 0

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.start)

    @cached_property
    def _order(self) -> Counts:
        return np.argsort(self.reader, kind="stable")

    @cached_property
    def _first_of_reader(self) -> Counts:
        return np.searchsorted(self.reader[self._order], np.arange(self.readers + 1))

    @cached_property
    def round_of(self) -> Counts:
        """In which round each slice is read."""
        found = np.empty(len(self), dtype=np.int64)
        found[self._order] = np.arange(len(self)) - self._first_of_reader[self.reader[self._order]]
        return found

    @cached_property
    def rounds(self) -> int:
        """Number of rounds."""
        return int(np.diff(self._first_of_reader).max(initial=0))

    @property
    def rounds_in_flight(self) -> int:
        """Most rounds that a reader has begun and not ended.

        The only one receives nothing: in the place of what would arrive it keeps what it sends beside.
        """
        return min(self.rounds, 2) if self.readers == 1 else 1

    @cached_property
    def bytes_of_reader(self) -> Counts:
        """Bytes that each reader requests."""
        return np.bincount(self.reader, weights=self.stop - self.start, minlength=self.readers).astype(
            np.int64
        )

    def number(self, reader: int, turn: int) -> int | None:
        """Return which slice a reader reads in a round, None where it has none left."""
        at = self._first_of_reader[reader] + turn
        return int(self._order[at]) if at < self._first_of_reader[reader + 1] else None

    def of_reader(self, reader: int) -> Counts:
        """Return which slices a reader reads, in order."""
        return self._order[self._first_of_reader[reader] : self._first_of_reader[reader + 1]]

    @cached_property
    def _elements_before(self) -> Counts:
        return np.cumsum([0, *(strip.high - strip.low for strip in self.strips)])

    @cached_property
    def _first_element(self) -> Counts:
        return self._elements_before[self.strip] + self.element

    def holding(self, runs: Sequence[tuple[int, int, int]]) -> Counts:
        """Return which slices hold something of some runs of elements, in order.

        Args:
            runs: Index of a strip, first element and the one after the last, counted from the start of the strip.
        """
        if not runs:
            return np.zeros(0, dtype=np.int64)
        strip, low, high = np.array(runs, dtype=np.int64).T
        base = self._elements_before[strip]
        first = np.searchsorted(self._first_element, base + low, side="right") - 1
        last = np.searchsorted(self._first_element, base + high - 1, side="right")
        marks = np.zeros(len(self) + 1, dtype=np.int64)
        np.add.at(marks, first, 1)
        np.add.at(marks, last, -1)
        return np.flatnonzero(np.cumsum(marks[:-1]) > 0)

    def slice(self, number: int | np.int64) -> Slice:
        """Return one slice with its units."""
        stop = int(self.stop[number])
        units: list[Unit] = []
        at, skipped = int(self.strip[number]), int(self.element[number])
        file = self.strips[at].stored.file
        while at < len(self.strips) and self.strips[at].stored.file == file:
            strip = self.strips[at]
            if strip.start >= stop:
                break
            high = min(strip.high, (stop - strip.stored.start) // strip.stored.dtype.itemsize)
            units.append(Unit(strip=strip, low=strip.low + skipped, high=high))
            at, skipped = at + 1, 0
        return Slice(file=file, start=int(self.start[number]), stop=stop, units=tuple(units))

    @cached_property
    def _begins_extent(self) -> NDArray[np.bool_]:
        """Whether each slice is read without the one before: another part, or not next to it in the file."""
        file = np.cumsum([a.stored.file != b.stored.file for a, b in pairwise(self.strips[:1] + self.strips)])
        of_slice = file[self.strip]
        goes_on = (
            (self.extent[1:] == self.extent[:-1])
            & (self.start[1:] == self.stop[:-1])
            & (of_slice[1:] == of_slice[:-1])
        )
        return np.append(True, ~goes_on)

    @cached_property
    def extents_of_reader(self) -> Counts:
        """How many extents each reader reads."""
        return np.bincount(self.reader[self._begins_extent[: len(self)]], minlength=self.readers)

    @cached_property
    def two_extents_bytes(self) -> Counts:
        """Most bytes of one extent and the next, of each reader."""
        head = np.flatnonzero(self._begins_extent[: len(self)])
        nbytes = self.stop[np.append(head[1:], len(self)) - 1] - self.start[head] if len(head) else head
        order = np.argsort(self.reader[head], kind="stable")
        nbytes, reader = nbytes[order], self.reader[head][order]
        following = np.append(nbytes[1:] * (reader[1:] == reader[:-1]), 0)[: len(nbytes)]
        found = np.zeros(self.readers, dtype=np.int64)
        np.maximum.at(found, reader, nbytes + following)
        return found

    def extents(self, reader: int) -> Iterator[Extent]:
        """Yield what a reader reads at once, in the order of its rounds.

        Args:
            reader: Its position among the readers.
        """
        numbers = self.of_reader(reader)
        heads = np.flatnonzero(self._begins_extent[numbers])
        for head, after in pairwise([*heads.tolist(), len(numbers)]):
            first, last = numbers[head], numbers[after - 1]
            yield Extent(
                file=self.strips[self.strip[first]].stored.file,
                start=int(self.start[first]),
                stop=int(self.stop[last]),
                slices=after - head,
            )
