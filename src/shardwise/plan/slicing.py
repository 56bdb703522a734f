"""How large a slice of an exchange may be, so that what a rank reads, sends and receives in one round fits its buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from shardwise.plan.cutting import cut_strips
from shardwise.plan.round_load import RoundLoad
from shardwise.plan.slices import Slices
from shardwise.plan.strips import Strip, strips_of
from shardwise.plan.wanted import WantedTensor

_LEAST_BYTES = 16  # holds an element of any dtype


def slices_of(
    wanted: Sequence[WantedTensor],
    chosen: frozenset[int],
    *,
    ranks: Sequence[int],
    buffer_bytes: int,
    readers: Sequence[int],
    reader_of: Callable[[str], int] | None,
) -> Slices:
    """Return what is read in an exchange, by which rank and in which round; the same on all ranks.

    Args:
        wanted: The tensors; the same on all ranks.
        chosen: Indices of those that are exchanged.
        ranks: Global ranks that take part, in one order on all of them; what only others own is not read.
        buffer_bytes: Bound of what a rank reads, sends or receives in one round, in bytes, alignment aside.
        readers: Those of `ranks` that read.
        reader_of: From a file to the one of `readers` that alone can read it; None where all can.
    """
    strips = strips_of(wanted, chosen, owners=ranks)
    position_of = {reader: position for position, reader in enumerate(readers)}
    position_of_file = None if reader_of is None else lambda file: position_of[reader_of(file)]
    load = RoundLoad(strips, wanted, owners=ranks, readers=readers)
    buffer_bytes = slice_bytes = max(buffer_bytes, _LEAST_BYTES)
    # Even if all that is read in one round were one rank's, it would fit a buffer.
    least_bytes = max(_LEAST_BYTES, buffer_bytes // max(1, len(readers) * _most_takers(strips)))
    while True:
        slices = cut_strips(
            strips,
            extent_bytes=buffer_bytes,
            slice_bytes=slice_bytes,
            readers=len(readers),
            reader_of=position_of_file,
        )
        most_bytes = load.most_bytes(slices) if slice_bytes > least_bytes else 0
        if most_bytes <= buffer_bytes:
            return replace(slices, most_received_bytes=most_bytes or buffer_bytes)
        # What one rank gets in a round shrinks with the slices, more or less.
        slice_bytes = max(least_bytes, min(slice_bytes * 7 // 8, slice_bytes * buffer_bytes // most_bytes))


def _most_takers(strips: Sequence[Strip]) -> int:
    """Return how many tensors take one element of a stored one, at most."""
    return max((-(-sum(piece.numel for _, piece in s.takers) // (s.high - s.low)) for s in strips), default=1)
