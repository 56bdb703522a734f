"""Tensors that ranks read together: each byte is read once, by one rank, and handed to the ranks that own it.

Two kinds of tensor go this way. A rank's part may be many short runs of bytes, as of a shard on a dim other than 0 or of a
transposed weight, so that every rank would read nearly the whole tensor to get its elements. And thousands of small parts
would be as many small reads on every rank. Their bytes are cut into slices in file order, dealt out to the ranks in turn,
and exchanged in rounds: in one round each rank reads one slice and one all-to-all moves the pieces. A slice holds so
little that whatever goes to one rank in a round fits its receive buffer, even if every piece went there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

from shardwise.checkpoint import StoredTensor
from shardwise.conversion import Piece
from shardwise.plan.boxes import aligned
from shardwise.plan.wanted import WantedTensor

MAX_WASTE = 1.02
"""Bytes read over bytes needed, from which on a tensor is exchanged: the bound that a whole job keeps."""
SMALL_BYTES = 256 * 2**10
"""A rank's run of bytes below this is a small read."""
SMALL_TENSORS = 64
"""So many small runs in a row are read together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A run of a stored tensor's elements, and the tensors of the model that take from it.

    Args:
        stored: The tensor.
        low: First element, inclusive.
        high: Last element, exclusive.
        takers: Index into the wanted tensors, and the piece that it takes of the whole stored tensor.
        is_whole: Whether it is all that anybody takes of the stored tensor.
    """

    stored: StoredTensor
    low: int
    high: int
    takers: tuple[tuple[int, Piece], ...]
    is_whole: bool

    @property
    def start(self) -> int:
        """First byte in the file."""
        return self.stored.start + self.low * self.stored.dtype.itemsize

    @property
    def stop(self) -> int:
        """Byte after the last one in the file."""
        return self.stored.start + self.high * self.stored.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What one rank reads in one round: units that follow each other in one file."""

    file: str
    start: int
    stop: int
    units: tuple[Unit, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A piece on its way from the slice of the rank that read it to the shard of the rank that owns it.

    Args:
        fqn: Of the tensor.
        dtype: As stored.
        piece: Its elements; targets are places in the owner's shard.
        slice_offset: Of its first element in the slice, in bytes.
        message_offset: Where it stands in the message, packed, in bytes; aligned.
    """

    fqn: str
    dtype: torch.dtype
    piece: Piece
    slice_offset: int
    message_offset: int

    @property
    def nbytes(self) -> int:
        """Of the elements, in bytes."""
        return self.piece.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One rank's part in one round.

    Args:
        position: Of this rank, in the order of the plan's ranks.
        read: What it reads; None where the slices ran out.
        kept: What it takes of its own slice.
        outgoing: For each rank, in the order of the plan's ranks; none for itself.
        incoming: From each rank, in the same order; none from itself.
        send_bytes: Length of the message to each rank.
        receive_bytes: Length of the message from each rank.
    """

    position: int
    read: Slice | None
    kept: tuple[Transfer, ...]
    outgoing: tuple[tuple[Transfer, ...], ...]
    incoming: tuple[tuple[Transfer, ...], ...]
    send_bytes: tuple[int, ...]
    receive_bytes: tuple[int, ...]

    @property
    def fqns(self) -> frozenset[str]:
        """The tensors of which this rank gets a piece."""
        return frozenset(t.fqn for message in (self.kept, *self.incoming) for t in message)


def exchanged(wanted: Sequence[WantedTensor], *, ranks: Sequence[int]) -> frozenset[int]:
    """Return which tensors the ranks read together, by index.

    Args:
        wanted: The tensors.
        ranks: Global ranks that take part.

    Returns:
        The same on every rank.
    """
    if len(ranks) == 1:
        return frozenset()
    judge = _Judge(ranks)
    chosen = {index for index, tensor in enumerate(wanted) if judge.is_wasteful(tensor)}
    small: list[int] = []
    runs = 0
    # A tensor of several pieces stands where its first one does: those of one layer lie near each other.
    placed = [
        i for i in range(len(wanted)) if wanted[i].pieces
    ]  # an empty tensor lies nowhere and ends no row
    for index in sorted(placed, key=lambda i: _place(wanted[i])):
        if index in chosen or not judge.is_small(wanted[index]):
            chosen |= set(small) if runs >= SMALL_TENSORS else set()
            small, runs = [], 0
        else:
            small.append(index)
            runs += len(wanted[index].pieces)
    return frozenset(chosen | (set(small) if runs >= SMALL_TENSORS else set()))


def _place(tensor: WantedTensor) -> tuple[str, int]:
    return min((each.stored.file, each.stored.start) for each in tensor.pieces)


class _Judge:
    """Looks at each kind of tensor once: the layers of a model repeat their shapes.

    Args:
        ranks: Global ranks that take part.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = ranks
        self._known: dict[tuple[int, tuple[int, ...], tuple[Piece, ...]], bool] = {}

    def is_wasteful(self, tensor: WantedTensor) -> bool:
        """Return whether runs of bytes that cover what each rank needs hold much that it does not need."""
        key = (id(tensor.layout), tensor.shape, tuple(each.piece for each in tensor.pieces))
        if key not in self._known:
            needed = spanned = 0
            for rank in self._ranks:
                for each in tensor.pieces:
                    for piece in tensor.layout.local_pieces(each.piece, tensor.shape, rank):
                        needed += piece.numel
                        spanned += piece.source_span
            self._known[key] = spanned > MAX_WASTE * needed
        return self._known[key]

    def is_small(self, tensor: WantedTensor) -> bool:
        """Return whether the first rank's part of a tensor is runs of few bytes that are not mapped."""
        if tensor.always_mapped:
            return False
        pieces = list(tensor.pieces_on(tensor.layout.mesh_ranks[0]))
        nbytes = sum(each.piece.numel * each.stored.dtype.itemsize for each in pieces)
        return nbytes < SMALL_BYTES * max(1, len(pieces))


def slices_of(wanted: Sequence[WantedTensor], chosen: frozenset[int], *, slice_bytes: int) -> list[Slice]:
    """Cut the bytes that the chosen tensors take into slices, in file order."""
    takers: dict[str, tuple[StoredTensor, list[tuple[int, Piece]]]] = {}
    for index in sorted(chosen):
        for each in wanted[index].pieces:
            takers.setdefault(each.stored.name, (each.stored, []))[1].append((index, each.piece))
    slices: list[Slice] = []
    pending: list[Unit] = []

    def close() -> None:
        if pending:
            slices.append(
                Slice(
                    file=pending[0].stored.file,
                    start=pending[0].start,
                    stop=pending[-1].stop,
                    units=tuple(pending),
                )
            )
            pending.clear()

    for stored, of_stored in sorted(takers.values(), key=lambda item: (item[0].file, item[0].start)):
        for unit in _units(stored, tuple(of_stored), slice_bytes):
            follows = (
                bool(pending) and pending[-1].stored.file == stored.file and pending[-1].stop == unit.start
            )
            if not follows or unit.stop - pending[0].start > slice_bytes:
                close()
            pending.append(unit)
    close()
    return slices


def _units(stored: StoredTensor, takers: tuple[tuple[int, Piece], ...], slice_bytes: int) -> Iterator[Unit]:
    step = slice_bytes // stored.dtype.itemsize
    first = min(piece.source_start for _, piece in takers)
    last = max(piece.source_start + piece.source_span for _, piece in takers)
    for low in range(first, last, step):
        high = min(low + step, last)
        yield Unit(stored=stored, low=low, high=high, takers=takers, is_whole=(low, high) == (first, last))


def plan_rounds(
    wanted: Sequence[WantedTensor],
    chosen: frozenset[int],
    *,
    ranks: Sequence[int],
    rank: int,
    buffer_bytes: int,
    reader_of: Callable[[str], int] | None = None,
) -> Iterator[Round]:
    """Plan one rank's part in the exchange.

    Args:
        wanted: The tensors; the same on all ranks.
        chosen: As `exchanged` returned.
        ranks: Global ranks that take part.
        rank: This one.
        buffer_bytes: Bound of what a rank reads, sends or receives in one round, in bytes, alignment aside.
        reader_of: From a file to the position of the rank that alone can read it; None where all can.

    Yields:
        Rounds in order; equally many on every rank.
    """
    slices = slices_of(wanted, chosen, slice_bytes=max(16, buffer_bytes // len(ranks)))
    own = list(ranks).index(rank)
    of_reader: list[list[Slice]] = [[] for _ in ranks]
    for number, each in enumerate(slices):
        of_reader[reader_of(each.file) if reader_of is not None else number % len(ranks)].append(each)
    for of_round in zip_longest(*of_reader):
        read = of_round[own]
        outgoing: list[tuple[Transfer, ...]] = []
        incoming: list[tuple[Transfer, ...]] = []
        for position, other in enumerate(ranks):
            of_other = of_round[position]
            outgoing.append(_transfers(read, wanted, other) if position != own else ())
            incoming.append(_transfers(of_other, wanted, rank) if position != own else ())
        yield Round(
            position=own,
            read=read,
            kept=_transfers(read, wanted, rank),
            outgoing=tuple(outgoing),
            incoming=tuple(incoming),
            send_bytes=tuple(map(_length, outgoing)),
            receive_bytes=tuple(map(_length, incoming)),
        )


def _length(message: tuple[Transfer, ...]) -> int:
    return aligned(message[-1].message_offset + message[-1].nbytes) if message else 0


def _transfers(read: Slice | None, wanted: Sequence[WantedTensor], owner: int) -> tuple[Transfer, ...]:
    """Return what of a slice belongs to a rank, in the order of the message: the same on both ends."""
    transfers: list[Transfer] = []
    offset = 0
    for unit in read.units if read is not None else ():
        itemsize = unit.stored.dtype.itemsize
        origin = unit.stored.start - read.start  # type: ignore[union-attr]
        for index, piece in _owned(unit, wanted, owner):
            transfers.append(
                Transfer(
                    fqn=wanted[index].fqn,
                    dtype=unit.stored.dtype,
                    piece=piece,
                    slice_offset=origin + piece.source_start * itemsize,
                    message_offset=offset,
                )
            )
            offset = aligned(offset + piece.numel * itemsize)
    return tuple(transfers)


def _owned(unit: Unit, wanted: Sequence[WantedTensor], owner: int) -> Iterator[tuple[int, Piece]]:
    for index, piece in unit.takers:
        tensor = wanted[index]
        if unit.is_whole:
            for local in tensor.layout.local_pieces(piece, tensor.shape, owner):
                yield index, local
            continue
        for part in piece.cut_source(unit.low, unit.high):
            for local in tensor.layout.cut_pieces(part, tensor.shape, owner):
                yield index, local
