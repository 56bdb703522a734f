"""Boxes of a tensor that lies in memory or in a file row by row: where they begin, how far they reach, how to cut them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shardwise.conversion import Piece
from shardwise.tensors import Region

ALIGNMENT_BYTES = 16
"""Every element size divides it, so that any piece that begins at a multiple can be viewed in its own dtype."""


def aligned(offset: int) -> int:
    """Return the next multiple of `ALIGNMENT_BYTES` that is not below an offset."""
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def offset_of(index: Sequence[int], strides: Sequence[int]) -> int:
    """Return how many elements lie before the one at an index."""
    return sum(at * stride for at, stride in zip(index, strides, strict=True))


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the number of elements from the first to the last of a box that is not empty, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def cut(region: Region, strides: tuple[int, ...], max_span: int) -> Iterator[Region]:
    """Cut a region into boxes whose first and last element are at most `max_span` elements apart.

    Args:
        region: In a full tensor; of an empty one nothing is left.
        strides: Of the tensor that the elements lie in.
        max_span: At least 1.

    Yields:
        Boxes in row-major order, cut by rows where a row fits, else within rows.
    """
    if region.numel == 0:
        return
    if span(region.shape, strides) <= max_span:
        yield region
        return
    dim = next(d for d, size in enumerate(region.shape) if size > 1)
    inner = span(region.shape[dim + 1 :], strides[dim + 1 :])
    rows = max(1, (max_span - inner) // strides[dim] + 1)
    for low in range(region.start[dim], region.stop[dim], rows):
        high = min(low + rows, region.stop[dim])
        part = Region(
            start=(*region.start[:dim], low, *region.start[dim + 1 :]),
            stop=(*region.stop[:dim], high, *region.stop[dim + 1 :]),
        )
        yield from cut(part, strides, max_span)


def split_region(region: Region, *, max_numel: int) -> Iterator[Region]:
    """Cut a region that is packed on its own into parts of at most `max_numel` elements."""
    return cut(region, row_major_strides(region.shape), max_numel)


def shift_of(piece: Piece, shape: Sequence[int]) -> int | None:
    """Return what to add to the place of an element in the source to get its place in the target, both row by row.

    Args:
        piece: Of a source.
        shape: Of the target.

    Returns:
        The number; None where it differs between elements of the piece.
    """
    strides = row_major_strides(shape)
    loops = zip(piece.target_dims, piece.target_strides, piece.source_strides, strict=True)
    if any(strides[dim] * step != source for dim, step, source in loops):
        return None
    return offset_of(piece.target_start, strides) - piece.source_start
