"""What a buffer of bytes holds for the shards of a rank, and in which copies it gets to a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from shardwise.conversion import Piece
from shardwise.materialization.placing import elements_in, packed_in

DIRECT_FROM_BYTES = 256 * 2**10
"""A run of this size goes straight into its shard; of smaller ones a copy each would cost more than the bytes."""
MAX_GAP_BYTES = 4096
"""Bytes that nobody wants between two landings that are copied together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Landing:
    """Elements in a buffer, and where they belong.

    Args:
        fqn: Of the shard.
        dtype: As they are in the buffer.
        piece: Which they are; targets are places in the shard.
        offset: Of the first one in the buffer, in bytes.
        is_packed: Whether they stand one after the other in the order of the piece's loops, and not as in the file.
    """

    fqn: str
    dtype: torch.dtype
    piece: Piece
    offset: int
    is_packed: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer from the first element to the last."""
        return (self.piece.numel if self.is_packed else self.piece.source_span) * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """Last byte in the buffer, exclusive."""
        return self.offset + self.nbytes

    @property
    def is_one_run(self) -> bool:
        """Whether the elements stand one after the other in the buffer, in the order of the shard."""
        return self.is_packed or self.piece.is_one_run

    def elements(self, buffer: torch.Tensor, *, begin: int) -> torch.Tensor:
        """Return the elements, one dim for each loop of the piece.

        Args:
            buffer: uint8, contiguous; the bytes from `begin` on.
            begin: In bytes.
        """
        taken = packed_in if self.is_packed else elements_in
        return taken(buffer, self.offset - begin, self.dtype, self.piece)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Bytes of a buffer that travel to the device at once.

    Args:
        start: First byte of the buffer, inclusive.
        stop: Last byte, exclusive.
        landings: That they hold.
        run: Elements of the shard, flat, that they are; None: they go to scratch memory of the device, and are placed from there.
    """

    start: int
    stop: int
    landings: tuple[Landing, ...]
    run: range | None

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.stop - self.start


def plan_copies(
    landings: Sequence[Landing], *, run_of: Callable[[Landing], range | None], scratch_bytes: int
) -> list[Copy]:
    """Plan how a buffer gets to a device.

    Args:
        landings: Of the buffer, in any order.
        run_of: Returns the elements of its shard, flat and in the landing's dtype, that a landing is as it is; None where it is none.
        scratch_bytes: Most that a copy to scratch memory may hold; a landing alone may be longer.

    Returns:
        The copies. What is placed from scratch memory lies there at multiples of its element's size.
    """
    copies: list[Copy] = []
    pending: list[Landing] = []
    start = stop = 0

    def flush() -> None:
        if pending:
            copies.append(Copy(start=start, stop=stop, landings=tuple(pending), run=None))
            pending.clear()

    for landing in sorted(landings, key=lambda each: each.offset):
        run = run_of(landing) if landing.nbytes >= DIRECT_FROM_BYTES else None
        if run is not None:
            copies.append(Copy(start=landing.offset, stop=landing.stop, landings=(landing,), run=run))
            continue
        joins = (
            bool(pending)
            and landing.offset - stop <= MAX_GAP_BYTES
            and (landing.offset - start) % landing.dtype.itemsize == 0
            and max(stop, landing.stop) - start <= scratch_bytes
        )
        if not joins:
            flush()
            start = stop = landing.offset
        pending.append(landing)
        stop = max(stop, landing.stop)
    flush()
    return copies
