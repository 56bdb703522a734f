"""Strips cut into slices, and dealt out to the ranks that read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shardwise.plan.slices import Counts, Slices
from shardwise.plan.strips import Strip

_BYTES_OF_A_ROUND = 2**16
"""A round costs as much as reading so many bytes: readers of many short runs get fewer bytes."""


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
