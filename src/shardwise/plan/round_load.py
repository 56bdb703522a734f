"""How many bytes one rank gets in one round of an exchange, at most: without looking at every rank and slice.

What ranks own of a tensor that is cut into equal runs of rows is equal runs of its elements. A piece that keeps their order
turns elements of a file into elements of the tensor by adding a number, so which ranks a slice reaches, and with how much,
is arithmetic: it is added up in an array of differences over the ranks, exactly but for the alignment of messages. Of any
other piece only a bound is known, from how many elements of a run of the file one rank can own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch.distributed.tensor.placement_types import _StridedShard

from shardwise.conversion import Piece
from shardwise.plan.boxes import ALIGNMENT_BYTES
from shardwise.plan.cutting import merged
from shardwise.plan.equal_runs import EqualRuns, equal_runs
from shardwise.plan.layout import Layout
from shardwise.plan.slices import Counts, Slices
from shardwise.plan.strips import Strip
from shardwise.plan.wanted import WantedTensor

_MOST_CELLS = 2**22  # of a table of rounds by ranks


class RoundLoad:
    """Adds up what the ranks get.

    Args:
        strips: Of the exchange.
        wanted: The tensors.
        owners: Global ranks that take part.
        readers: Those of them that read.
    """

    def __init__(
        self,
        strips: Sequence[Strip],
        wanted: Sequence[WantedTensor],
        *,
        owners: Sequence[int],
        readers: Sequence[int],
    ) -> None:
        self._owners = frozenset(owners)
        self._readers = readers
        self._itemsize = np.array([strip.stored.dtype.itemsize for strip in strips], dtype=np.int64)
        self._low = np.array([strip.low for strip in strips], dtype=np.int64)
        lengths = np.array([strip.high - strip.low for strip in strips], dtype=np.int64) * self._itemsize
        self._before = np.concatenate([[0], np.cumsum(lengths)])  # bytes
        self._layouts: list[Layout] = []
        number_of: dict[int, int] = {}
        known: dict[tuple[int, tuple[int, ...], Piece], EqualRuns | None] = {}
        rows: list[tuple[int, int, int, int, int, int]] = []  # strip, layout, offset, run, first, last
        others: dict[tuple[int, tuple[int, ...], Piece], list[int]] = {}
        for at, strip in enumerate(strips):
            for index, piece in strip.takers:
                tensor = wanted[index]
                key = (id(tensor.layout), tensor.shape, piece)
                if key not in known:
                    known[key] = equal_runs(piece, tensor.shape, tensor.layout)
                found = known[key]
                if found is None:
                    others.setdefault(key, []).append(at)
                    continue
                layout = number_of.setdefault(id(tensor.layout), len(number_of))
                if layout == len(self._layouts):
                    self._layouts.append(tensor.layout)
                first = piece.source_start
                rows.append((at, layout, found.offset, found.numel, first, first + piece.source_span))
        self._rows = np.array(rows, dtype=np.int64).reshape(-1, 6)
        layout_of = {id(tensor.layout): tensor.layout for tensor in wanted}
        self._others = [
            (np.array(strips_of_key, dtype=np.int64), layout_of[layout], shape, piece)
            for (layout, shape, piece), strips_of_key in others.items()
        ]

    def most_bytes(self, slices: Slices) -> int:
        """Return a number of bytes that no rank exceeds in any round.

        Args:
            slices: Cut from the same strips.
        """
        if not len(slices):
            return 0
        unit_strip, unit_slice, low, high = self._units(slices)
        turn = slices.round_of[unit_slice]
        most = self._bounded(unit_strip, low, high, turn, slices.rounds)
        of_strip = np.argsort(self._rows[:, 0], kind="stable")
        sorted_rows = self._rows[of_strip]
        first = np.searchsorted(sorted_rows[:, 0], unit_strip)
        count = np.searchsorted(sorted_rows[:, 0], unit_strip, side="right") - first
        unit = np.repeat(np.arange(len(unit_strip)), count)
        taker = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(unit))
        _, layout, offset, run, start, stop = sorted_rows[taker].T
        low, high = np.maximum(low[unit], start) + offset, np.minimum(high[unit], stop) + offset
        itemsize = self._itemsize[unit_strip[unit]]
        turn, reader = turn[unit], slices.reader[unit_slice[unit]]
        kept = low < high
        for number, of in enumerate(self._layouts):
            those = kept & (layout == number)
            most = most + self._of_layout(
                of,
                low[those],
                high[those],
                run[those],
                itemsize[those],
                turn[those],
                reader[those],
                slices.rounds,
            )
        return int(most.max(initial=0))

    def _units(self, slices: Slices) -> tuple[Counts, Counts, Counts, Counts]:
        """Return strip, slice, first and last element of each run of elements of one strip in one slice."""
        at = self._before[slices.strip] + slices.element * self._itemsize[slices.strip]
        edges = merged(self._before[:-1], at)
        strip = np.searchsorted(self._before, edges, side="right") - 1
        of_slice = np.searchsorted(at, edges, side="right") - 1
        ends = np.append(edges[1:], self._before[-1])
        base, size = self._before[strip], self._itemsize[strip]
        low = self._low[strip] + (edges - base) // size
        return strip, of_slice, low, self._low[strip] + (ends - base) // size

    def _of_layout(
        self,
        layout: Layout,
        low: Counts,
        high: Counts,
        run: Counts,
        itemsize: Counts,
        turn: Counts,
        reader: Counts,
        rounds: int,
    ) -> Counts:
        """Return the most that a rank gets in each round of the tensors of one layout."""
        shards = len(layout.mesh_ranks) // layout.copies
        first, last = low // run, (high - 1) // run
        whole = -(-run * itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        short_first = _down((low - first * run) * itemsize)
        short_last = _down(((last + 1) * run - high) * itemsize)
        # What a reader takes of its own slice is not sent to it.
        position = self._positions(layout)[reader]
        own_low, own_high = np.maximum(low, position * run), np.minimum(high, (position + 1) * run)
        own = _down(np.maximum(own_high - own_low, 0) * itemsize) * (position >= 0)
        kept, readers_of = self._readers_of_shards(layout)
        order = np.argsort(turn, kind="stable")
        found = np.zeros(rounds, dtype=np.int64)
        width = shards + 2
        step = max(1, _MOST_CELLS // width)
        for start in range(0, rounds, step):
            stop = min(start + step, rounds)
            a, b = np.searchsorted(turn[order], [start, stop])
            those = order[a:b]
            row = (turn[those] - start) * width
            cells = (stop - start) * width
            starts = np.bincount(row + first[those], whole[those], cells)
            starts -= np.bincount(row + last[those] + 1, whole[those], cells)
            load = np.cumsum(starts.reshape(-1, width), axis=1)
            points = np.bincount(row + first[those], short_first[those], cells)
            points += np.bincount(row + last[those], short_last[those], cells)
            left = load - points.reshape(-1, width)
            wide = len(self._readers) + 1  # the last one stands for ranks that do not read
            of_reader = np.bincount(
                (turn[those] - start) * wide + reader[those], own[those], (stop - start) * wide
            ).reshape(-1, wide)
            # Of the ranks that keep a shard, the one that has read least of it gets most.
            left = left[:, kept] - of_reader[:, readers_of].min(axis=2)
            found[start:stop] = left.max(axis=1, initial=0).astype(np.int64)
        return found

    def _positions(self, layout: Layout) -> Counts:
        """Return which shard each reader keeps; -1 for one outside of the mesh."""
        shard_of = {rank: shard for shard, ranks in enumerate(layout.ranks_of_shards) for rank in ranks}
        return np.array([shard_of.get(reader, -1) for reader in self._readers], dtype=np.int64)

    def _readers_of_shards(self, layout: Layout) -> tuple[Counts, Counts]:
        """Return which shards the owners keep, and for each of these the numbers of the owners that keep it as readers.

        An owner that does not read has the number after the last reader's.
        """
        number_of = {reader: number for number, reader in enumerate(self._readers)}
        found = {
            shard: [number_of.get(rank, len(self._readers)) for rank in ranks if rank in self._owners]
            for shard, ranks in enumerate(layout.ranks_of_shards)
        }
        kept = [shard for shard, numbers in found.items() if numbers]
        most = max((len(found[shard]) for shard in kept), default=0)
        padded = [found[shard] + found[shard][:1] * (most - len(found[shard])) for shard in kept]
        return np.array(kept, dtype=np.int64), np.array(padded, dtype=np.int64)

    def _bounded(self, strip: Counts, low: Counts, high: Counts, turn: Counts, rounds: int) -> Counts:
        """Return a bound of what a rank gets in each round of pieces that are no equal runs."""
        most = np.zeros(rounds, dtype=np.int64)
        for strips, layout, shape, piece in self._others:
            first = np.searchsorted(strip, strips)
            count = np.searchsorted(strip, strips, side="right") - first
            those = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(count.sum())
            start, stop = piece.source_start, piece.source_start + piece.source_span
            run = np.minimum(high[those], stop) - np.maximum(low[those], start)
            those, run = those[run > 0], run[run > 0]
            nbytes = _owned_of_run(piece, shape, layout, run) * self._itemsize[strip[those]] + ALIGNMENT_BYTES
            most += np.bincount(turn[those], nbytes, rounds).astype(np.int64)
        return most


def _down(nbytes: Counts) -> Counts:
    return nbytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES


def _owned_of_run(piece: Piece, shape: tuple[int, ...], layout: Layout, run: Counts) -> Counts:
    """Return a bound of how many elements one rank owns of a run of a stored tensor's elements.

    Args:
        piece: That the tensor takes of the stored one.
        shape: Of the tensor.
        layout: Of the tensor.
        run: Lengths of runs.
    """
    if any(isinstance(placement, _StridedShard) for placement in layout.placements):
        return run
    largest = layout.local_shape(shape, layout.mesh_ranks[0])
    if largest is None:
        return run
    # Of nested loops along one dim a rank's rows cut the outermost, or are within one step of it.
    loops = []
    for size, source, dim, target in zip(
        piece.sizes, piece.source_strides, piece.target_dims, piece.target_strides, strict=True
    ):
        alone = piece.target_dims.count(dim) == 1
        loops.append((source, min(size, -(-largest[dim] // target)) if alone else size))
    return np.minimum(run, _steps_within(sorted(loops, reverse=True), run))


def _steps_within(loops: Sequence[tuple[int, int]], run: Counts) -> NDArray[np.int64]:
    """Return how many steps of nested loops can lie in runs of elements, at most.

    Args:
        loops: Stride and number of steps, outer first.
        run: Lengths of runs.
    """
    if not loops:
        return np.minimum(run, 1)
    (stride, size), inner = loops[0], loops[1:]
    # A run that is longer than the reach of the inner loops by k strides touches at most k + 2 steps of this one.
    reach = sum((n - 1) * s for s, n in inner)
    touched = np.minimum(size, (run - 1 + reach) // stride + 1)
    return touched * _steps_within(inner, run)
