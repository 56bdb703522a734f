"""Which element of a source tensor belongs where in a target tensor, as nested loops.

Stacking, concatenating, chunking, transposing and reshaping move elements in regular steps. A piece says how: one loop for
each run of equal steps, with its stride in the source and its stride along a dim of the target. Cutting a piece to a box
of the target, or to a run of the source, gives pieces again, so that a rank's part of a fused weight is found in the files
without converting anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from shardwise.errors import ConfigurationError
from shardwise.tensors import Region


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A strided copy from a source tensor into a target tensor.

    Loops stand in row-major order of the target. Within one dim of the target, and within the source, they are nested: a
    step of one loop is longer than all inner ones together, so that no element is met twice.

    Args:
        sizes: Steps of each loop; above 1.
        source_start: First element in the source, row-major.
        source_strides: Of each loop, in elements of the source.
        target_start: First element in the target, per dim.
        target_dims: Dim of the target that each loop walks along; ascending.
        target_strides: Of each loop, along its dim; descending within a dim.
    """

    sizes: tuple[int, ...]
    source_start: int
    source_strides: tuple[int, ...]
    target_start: tuple[int, ...]
    target_dims: tuple[int, ...]
    target_strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 where there is no loop."""
        return math.prod(self.sizes)

    @property
    def source_span(self) -> int:
        """Elements of the source from the first to the last, both included."""
        return 1 + sum((n - 1) * s for n, s in zip(self.sizes, self.source_strides, strict=True))

    @property
    def is_one_run(self) -> bool:
        """Whether its elements follow each other in the source in the order of the target."""
        expected = 1
        for size, stride in zip(reversed(self.sizes), reversed(self.source_strides), strict=True):
            if stride != expected:
                return False
            expected *= size
        return True

    def run_in(self, shape: Sequence[int]) -> range | None:
        """Return the run of elements that it fills in a contiguous target of `shape`; None where these do not follow each other.

        Args:
            shape: Of the target.
        """
        steps = _row_major(shape)
        expected = 1
        for size, dim, stride in zip(
            reversed(self.sizes), reversed(self.target_dims), reversed(self.target_strides), strict=True
        ):
            if steps[dim] * stride != expected:
                return None
            expected *= size
        start = sum(at * of_dim for at, of_dim in zip(self.target_start, steps, strict=True))
        return range(start, start + expected)

    @property
    def region(self) -> Region:
        """The smallest box of the target that holds it."""
        stop = [start + 1 for start in self.target_start]
        for size, dim, stride in zip(self.sizes, self.target_dims, self.target_strides, strict=True):
            stop[dim] += (size - 1) * stride
        return Region(start=self.target_start, stop=tuple(stop))

    def place_of(self, steps: Sequence[int]) -> tuple[int, ...]:
        """Return the place in the target of the element at some step of each loop."""
        place = list(self.target_start)
        for step, dim, stride in zip(steps, self.target_dims, self.target_strides, strict=True):
            place[dim] += step * stride
        return tuple(place)

    def within(self, region: Region) -> Iterator[Piece]:
        """Yield what of this piece lies in a box of the target, its places counted from the start of the box."""
        pieces: list[Piece] = [self]
        for dim, (low, high) in enumerate(zip(region.start, region.stop, strict=True)):
            pieces = [part for piece in pieces for part in piece.cut_target(dim, low, high)]
        for piece in pieces:
            yield piece.moved(tuple(-low for low in region.start))

    def moved(self, by: Sequence[int]) -> Piece:
        """Return the same piece at another place of the target."""
        return Piece(
            sizes=self.sizes,
            source_start=self.source_start,
            source_strides=self.source_strides,
            target_start=tuple(at + step for at, step in zip(self.target_start, by, strict=True)),
            target_dims=self.target_dims,
            target_strides=self.target_strides,
        )

    def reversed(self, shape: Sequence[int]) -> Piece:
        """Return the copy back: from the target, row-major, into the source as a tensor of one dim.

        Args:
            shape: Of the target.
        """
        steps = _row_major(shape)
        loops = [
            (size, steps[dim] * along, 0, source)
            for size, source, dim, along in zip(
                self.sizes, self.source_strides, self.target_dims, self.target_strides, strict=True
            )
        ]
        start = sum(at * of_dim for at, of_dim in zip(self.target_start, steps, strict=True))
        return made_of(loops, source_start=start, target_start=(self.source_start,))

    def cut_target(self, dim: int, low: int, high: int) -> Iterator[Piece]:
        """Yield what of this piece lies at `[low, high)` along a dim of the target."""
        loops = [loop for loop, of_dim in enumerate(self.target_dims) if of_dim == dim]
        steps = [(self.sizes[loop], self.target_strides[loop]) for loop in loops]
        for ranges in _ranges_within(steps, self.target_start[dim], low, high):
            yield self._narrowed(dict(zip(loops, ranges, strict=True)))

    def cut_source(self, low: int, high: int) -> Iterator[Piece]:
        """Yield what of this piece lies in elements `[low, high)` of the source."""
        loops = sorted(range(len(self.sizes)), key=lambda loop: -self.source_strides[loop])
        steps = [(self.sizes[loop], self.source_strides[loop]) for loop in loops]
        for ranges in _ranges_within(steps, self.source_start, low, high):
            yield self._narrowed(dict(zip(loops, ranges, strict=True)))

    def cut_to_span(self, max_span: int) -> Iterator[Piece]:
        """Cut into pieces whose first and last element are at most `max_span` elements of the source apart."""
        if self.source_span <= max_span:
            yield self
            return
        outer = max(range(len(self.sizes)), key=lambda loop: self.source_strides[loop])
        inner = self.source_span - (self.sizes[outer] - 1) * self.source_strides[outer]
        steps = max(1, (max_span - inner) // self.source_strides[outer] + 1)
        for low in range(0, self.sizes[outer], steps):
            part = self._narrowed({outer: (low, min(low + steps, self.sizes[outer]))})
            yield from part.cut_to_span(max_span)

    def _narrowed(self, ranges: dict[int, tuple[int, int]]) -> Piece:
        """Return the piece with some of its loops cut to `[low, high)` of their steps."""
        if all((low, high) == (0, self.sizes[loop]) for loop, (low, high) in ranges.items()):
            return self
        source_start, target_start = self.source_start, list(self.target_start)
        sizes = list(self.sizes)
        for loop, (low, high) in ranges.items():
            source_start += low * self.source_strides[loop]
            target_start[self.target_dims[loop]] += low * self.target_strides[loop]
            sizes[loop] = high - low
        loops = zip(sizes, self.source_strides, self.target_dims, self.target_strides, strict=True)
        return made_of(loops, source_start=source_start, target_start=tuple(target_start))


def _row_major(shape: Sequence[int]) -> list[int]:
    """Return how many elements a step along each dim of a contiguous tensor is."""
    steps, step = [0] * len(shape), 1
    for dim in range(len(shape) - 1, -1, -1):
        steps[dim] = step
        step *= shape[dim]
    return steps


Loop = tuple[int, int, int, int]  # steps, stride in the source, dim of the target, stride along it


def made_of(
    loops: Iterator[Loop] | Sequence[Loop], *, source_start: int, target_start: tuple[int, ...]
) -> Piece:
    """Return the piece of some loops in its normal form: row-major in the target, neighbours that are one run joined.

    Args:
        loops: In any order; of one step are left out.
        source_start: First element in the source.
        target_start: First element in the target, per dim.
    """
    joined: list[Loop] = []
    for size, source, dim, target in sorted((o for o in loops if o[0] > 1), key=lambda o: (o[2], -o[3])):
        if joined:
            outer_size, outer_source, outer_dim, outer_target = joined[-1]
            if outer_dim == dim and outer_source == size * source and outer_target == size * target:
                joined[-1] = (outer_size * size, source, dim, target)
                continue
        joined.append((size, source, dim, target))
    return Piece(
        sizes=tuple(o[0] for o in joined),
        source_start=source_start,
        source_strides=tuple(o[1] for o in joined),
        target_start=target_start,
        target_dims=tuple(o[2] for o in joined),
        target_strides=tuple(o[3] for o in joined),
    )


@lru_cache(maxsize=4096)  # a model repeats its shapes
def whole(shape: tuple[int, ...]) -> Piece:
    """Return the piece that takes a source of `shape`, not empty, as it is."""
    if 0 in shape:
        raise ConfigurationError(f"piece: expected at least one element, got shape {shape}")
    loops, stride = [], 1
    for dim in range(len(shape) - 1, -1, -1):
        loops.append((shape[dim], stride, dim, 1))
        stride *= shape[dim]
    return made_of(loops, source_start=0, target_start=(0,) * len(shape))


def _ranges_within(
    steps: Sequence[tuple[int, int]], start: int, low: int, high: int
) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yield ranges of nested loops, outer first, that together are all places in `[low, high)`.

    Args:
        steps: Size and stride of each loop, outer first; a stride is longer than all inner loops together.
        start: Place of the first step of all loops.
        low: First place wanted.
        high: Place after the last one wanted.
    """
    if not steps:
        if low <= start < high:
            yield ()
        return
    (size, stride), inner = steps[0], steps[1:]
    reach = sum((n - 1) * s for n, s in inner)  # of the inner loops
    first = max(0, -((start + reach - low) // stride))  # touches the range
    last = min(size, (high - 1 - start) // stride + 1)
    whole_first = max(first, -((start - low) // stride))  # lies in the range with all inner loops
    whole_last = min(last, (high - 1 - reach - start) // stride + 1)
    if whole_first >= whole_last:
        whole_first = whole_last = last
    for index in range(first, whole_first):
        for ranges in _ranges_within(inner, start + index * stride, low, high):
            yield ((index, index + 1), *ranges)
    if whole_first < whole_last:
        yield ((whole_first, whole_last), *((0, n) for n, _ in inner))
    for index in range(whole_last, last):
        for ranges in _ranges_within(inner, start + index * stride, low, high):
            yield ((index, index + 1), *ranges)
