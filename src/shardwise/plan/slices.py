"""What the ranks read in an exchange: the bytes of the strips, cut into slices and dealt out to the readers.

There may be millions of slices. They are kept as arrays, and become objects one by one, when they are carried out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from shardwise.plan.strips import Strip, Taker

Counts = NDArray[np.int64]

_BYTES_OF_A_ROUND = 2**16
"""A round costs as much as reading so many bytes: readers of many short runs get fewer bytes."""


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
    def longest_extent_bytes(self) -> int:
        """Size of the longest extent."""
        if not len(self):
            return 0
        head = np.flatnonzero(self._begins_extent)
        return int((self.stop[np.append(head[1:], len(self)) - 1] - self.start[head]).max())

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


def cut_strips(
    strips: list[Strip],
    *,
    extent_bytes: int,
    slice_bytes: int,
    readers: int,
    reader_of: Callable[[str], int] | None,
) -> Slices:
    """Cut strips into extents, deal these out to the readers in turn, and cut them into slices.

    In turn, because ranks then read neighbouring extents at one time, which belong to all ranks alike. A long run of the
    file for each reader would not do: where as many ranks read each layer, all are at the same place of theirs, and send
    to the same ranks.

    Args:
        strips: In file order.
        extent_bytes: Of which an extent is no longer.
        slice_bytes: Of which what the reader of a slice sends is no more, but for less than one element.
        readers: Number of ranks that read.
        reader_of: From a file to the position of the reader that alone can read it; None where all can.
    """
    if not strips:
        none = np.zeros(0, dtype=np.int64)
        return Slices(
            strips=strips,
            readers=readers,
            strip=none,
            element=none,
            start=none,
            stop=none,
            reader=none,
            extent=none,
            most_sent_bytes=0,
        )
    starts = np.array([strip.start for strip in strips], dtype=np.int64)
    stops = np.array([strip.stop for strip in strips], dtype=np.int64)
    itemsizes = np.array([strip.stored.dtype.itemsize for strip in strips], dtype=np.int64)
    sent_sizes = itemsizes * np.array([strip.weight for strip in strips], dtype=np.int64)
    names = {name: number for number, name in enumerate(dict.fromkeys(s.stored.file for s in strips))}
    files = np.array([names[strip.stored.file] for strip in strips], dtype=np.int64)
    begins = np.append(True, (starts[1:] != stops[:-1]) | (files[1:] != files[:-1]))  # a run of bytes

    # Positions count what is sent; the extents are found on a scale of bytes, on which a new run costs a round.
    sent_before = np.append(0, np.cumsum((stops - starts) // itemsizes * sent_sizes))
    cost_of_run = min(_BYTES_OF_A_ROUND, extent_bytes // 8)
    after = np.cumsum(stops - starts + begins * cost_of_run)
    before = after - (stops - starts)
    extents = readers * -(-int(after[-1]) // (readers * extent_bytes))
    edges = _multiples(int(after[-1]), extents)
    at = np.minimum(np.searchsorted(after, edges, side="right"), len(strips) - 1)
    inside = np.maximum(edges - before[at], 0) // itemsizes[at]
    edges = np.append(sent_before[at] + inside * sent_sizes[at], sent_before[-1])

    pieces = -(-np.diff(edges) // slice_bytes)
    extent = np.repeat(np.arange(extents), pieces)
    within = np.arange(len(extent)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    step, more = np.divmod(np.diff(edges)[extent], pieces[extent])
    cuts = merged(edges[extent] + within * step + np.minimum(within, more), sent_before[:-1][begins])

    strip = np.searchsorted(sent_before, cuts, side="right") - 1
    element = (cuts - sent_before[strip]) // sent_sizes[strip]
    fresh = np.append(True, (strip[1:] != strip[:-1]) | (element[1:] != element[:-1]))
    strip, element, cuts = strip[fresh], element[fresh], cuts[fresh]
    start = starts[strip] + element * itemsizes[strip]
    run = np.cumsum(begins)[strip]
    end_of_run = stops[np.append(np.flatnonzero(begins)[1:], len(strips)) - 1]
    last = np.append(run[1:] != run[:-1], True)
    stop = np.where(last, end_of_run[run - 1], np.append(start[1:], 0))
    extent = np.searchsorted(edges, cuts, side="right") - 1
    if reader_of is None:
        reader = extent % readers
    else:
        reader = np.array([reader_of(name) for name in names], dtype=np.int64)[files[strip]]
    return Slices(
        strips=strips,
        readers=readers,
        strip=strip,
        element=element,
        start=start,
        stop=stop,
        reader=reader,
        extent=extent,
        most_sent_bytes=int(np.diff(cuts, append=sent_before[-1]).max()),
    )


def _multiples(total: int, parts: int) -> Counts:
    """Return where equal parts of a total begin."""
    step, more = divmod(total, parts)  # first: the product of total and number may not fit 64 bits
    number = np.arange(parts)
    return number * step + number * more // parts


def merged(first: Counts, second: Counts) -> Counts:
    """Return the numbers of two sorted arrays in order, each once."""
    both = np.sort(np.concatenate([first, second]), kind="stable")  # which merges sorted runs
    found: Counts = both[np.append(True, both[1:] != both[:-1])]
    return found
