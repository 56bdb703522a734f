"""Tensors that ranks read together: each byte is read once, by one rank, and handed to the ranks that own it.

Two kinds of tensor go this way. A rank's part may be many short runs of bytes, as of a shard on a dim other than 0 or of a
transposed weight, so that every rank would read nearly the whole tensor to get its elements. And thousands of small parts
would be as many small reads on every rank. Their bytes are cut into extents in file order, and dealt out to the ranks in
turn. In one round each rank hands out one slice of what it has read, and one all-to-all moves the pieces. Where one rank
alone holds the bytes, it reads everything.

A slice is as large as three buffers allow: it fits one itself; what its reader sends of it fits one, also if several ranks
keep copies; and what the slices of one round bring to one rank fits one. All ranks find the same size.

A plan keeps the slices and what they bring to this rank in all. Rounds are made when they are carried out: of all ranks'
messages together they are N times as many as one rank's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shardwise.conversion import Piece
from shardwise.plan.boxes import aligned
from shardwise.plan.equal_runs import equal_runs
from shardwise.plan.slices import Counts, Extent, Slice, Slices, Unit
from shardwise.plan.slicing import slices_of
from shardwise.plan.wanted import WantedTensor


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
        read: The slice that it hands out; None where it has none left.
        kept: What it takes of its own slice.
        outgoing: For each rank, in the order of the plan's ranks; none for itself.
        incoming: From each rank, in the same order; none from itself.
        send_bytes: Length of the message to each rank.
        receive_bytes: Length of the message from each rank.
    """

    read: Slice | None
    kept: tuple[Transfer, ...]
    outgoing: tuple[tuple[Transfer, ...], ...]
    incoming: tuple[tuple[Transfer, ...], ...]
    send_bytes: tuple[int, ...]
    receive_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExchangePlan:
    """One rank's part in an exchange.

    Args:
        wanted: The tensors; the same on all ranks.
        ranks: Global ranks that take part.
        rank: This one.
        readers: Those of them that read.
        slices: That they read.
        buffer_bytes: Bound of what a rank reads at once, sends or receives in one round, in bytes, alignment aside.
        reaching: Which slices hold something of this rank, in order.
        arriving: Elements that reach this rank's shards, by fqn, with those that it reads itself.
        network_bytes: Of messages from other ranks, alignment included.
        mapped: Fqns of this rank's shards that are pages of the files: what it reads of them is for others.
    """

    wanted: tuple[WantedTensor, ...]
    ranks: tuple[int, ...]
    rank: int
    readers: tuple[int, ...]
    slices: Slices
    buffer_bytes: int
    reaching: Counts
    arriving: Mapping[str, int]
    network_bytes: int
    mapped: frozenset[str]

    def __len__(self) -> int:
        """Return the number of rounds, equal on every rank."""
        return self.slices.rounds

    @property
    def storage_bytes(self) -> int:
        """Bytes that this rank requests."""
        at = self._reader
        return int(self.slices.bytes_of_reader[at]) if at is not None else 0

    @property
    def rounds_in_flight(self) -> int:
        """Most rounds that this rank has begun and not ended."""
        return self.slices.rounds_in_flight if self._reader is not None else 1

    @property
    def _reader(self) -> int | None:
        return self.readers.index(self.rank) if self.rank in self.readers else None

    def extents(self) -> Iterator[Extent]:
        """Yield what this rank reads at once, in order: slices that follow each other, up to a buffer's size."""
        if self._reader is not None:
            yield from self.slices.extents(self._reader)

    def rounds(self) -> Iterator[Round]:
        """Yield this rank's part in each round, in order."""
        own = self.ranks.index(self.rank)
        position_of = {rank: position for position, rank in enumerate(self.ranks)}
        turns = self.slices.round_of[self.reaching]
        order = np.argsort(turns, kind="stable")  # rounds are met one after the other
        first_of_turn = np.searchsorted(turns[order], np.arange(len(self) + 1))
        for turn in range(len(self)):
            number = self.slices.number(self._reader, turn) if self._reader is not None else None
            read = self.slices.slice(number) if number is not None else None
            incoming: list[tuple[Transfer, ...]] = [()] * len(self.ranks)
            for at in order[first_of_turn[turn] : first_of_turn[turn + 1]]:
                reaching = self.reaching[at]
                sender = position_of[self.readers[self.slices.reader[reaching]]]
                if sender != own:
                    incoming[sender] = _transfers(self.slices.slice(reaching), self.wanted, self.rank)
            outgoing: list[tuple[Transfer, ...]] = [()] * len(self.ranks)
            for rank in _owners(read, self.wanted, self.ranks):
                if rank != self.rank and rank in position_of:
                    outgoing[position_of[rank]] = _transfers(read, self.wanted, rank)
            yield Round(
                read=read,
                kept=tuple(
                    transfer
                    for transfer in _transfers(read, self.wanted, self.rank)
                    if transfer.fqn not in self.mapped
                ),
                outgoing=tuple(outgoing),
                incoming=tuple(incoming),
                send_bytes=tuple(map(_length, outgoing)),
                receive_bytes=tuple(map(_length, incoming)),
            )


def plan_exchange(
    wanted: Sequence[WantedTensor],
    chosen: frozenset[int],
    *,
    ranks: Sequence[int],
    rank: int,
    buffer_bytes: int,
    readers: Sequence[int],
    reader_of: Callable[[str], int] | None = None,
    slices: Slices | None = None,
    mapped: frozenset[str] = frozenset(),
) -> ExchangePlan:
    """Plan one rank's part in the exchange.

    Args:
        wanted: The tensors; the same on all ranks.
        chosen: As `exchanged` returned.
        ranks: Global ranks that take part, in one order on all of them; what only others own is not read.
        rank: This one.
        buffer_bytes: Bound of what a rank reads, sends or receives in one round, in bytes, alignment aside.
        readers: Those of `ranks` that read.
        reader_of: From a file to the one of `readers` that alone can read it; None where all can.
        slices: As `slices_of` returned for the same arguments, which count for all ranks; None to make them.
        mapped: Fqns of this rank's shards that are pages of the files; only of one that reads for all.

    Returns:
        The plan.
    """
    if slices is None:
        slices = slices_of(
            wanted, chosen, ranks=ranks, buffer_bytes=buffer_bytes, readers=readers, reader_of=reader_of
        )
    arriving: dict[str, int] = {}
    network_bytes = 0
    reaching = _reaching(rank, slices, wanted)
    for number in reaching.tolist():
        message = _transfers(slices.slice(number), wanted, rank)
        network_bytes += _length(message) if readers[slices.reader[number]] != rank else 0
        for transfer in message:
            if transfer.fqn in mapped:
                continue
            arriving[transfer.fqn] = arriving.get(transfer.fqn, 0) + transfer.piece.numel
    return ExchangePlan(
        wanted=tuple(wanted),
        ranks=tuple(ranks),
        rank=rank,
        readers=tuple(readers),
        slices=slices,
        buffer_bytes=buffer_bytes,
        reaching=reaching,
        arriving=arriving,
        network_bytes=network_bytes,
        mapped=mapped,
    )


def _reaching(rank: int, slices: Slices, wanted: Sequence[WantedTensor]) -> Counts:
    """Return which slices may hold something of a rank, in order."""
    found: list[tuple[int, int, int]] = []
    for number, strip in enumerate(slices.strips):
        low, high = strip.high, strip.low
        for index, piece in strip.takers:
            tensor = wanted[index]
            for local in tensor.layout.local_pieces(piece, tensor.shape, rank):
                low = min(low, local.source_start)
                high = max(high, local.source_start + local.source_span)
        low, high = max(low, strip.low), min(high, strip.high)
        if low < high:
            found.append((number, low - strip.low, high - strip.low))
    return slices.holding(found)


def _owners(read: Slice | None, wanted: Sequence[WantedTensor], ranks: Sequence[int]) -> Collection[int]:
    """Return ranks of which a slice may hold something; all, where only a look at each of them would tell."""
    owners: set[int] = set()
    for unit in read.units if read is not None else ():
        for index, piece in unit.takers:
            tensor = wanted[index]
            runs = equal_runs(piece, tensor.shape, tensor.layout)
            if runs is None:
                return ranks
            low = max(unit.low, piece.source_start) + runs.offset
            high = min(unit.high, piece.source_start + piece.source_span) + runs.offset
            if low < high:
                shards = tensor.layout.ranks_of_shards
                for of_shard in shards[low // runs.numel : (high - 1) // runs.numel + 1]:
                    owners.update(of_shard)
    return owners


def _length(message: tuple[Transfer, ...]) -> int:
    return aligned(message[-1].message_offset + message[-1].nbytes) if message else 0


def _transfers(read: Slice | None, wanted: Sequence[WantedTensor], owner: int) -> tuple[Transfer, ...]:
    """Return what of a slice belongs to a rank, in the order of the message: the same on both ends."""
    transfers: list[Transfer] = []
    offset = 0
    for unit in read.units if read is not None else ():
        stored = unit.strip.stored
        itemsize = stored.dtype.itemsize
        origin = stored.start - read.start  # type: ignore[union-attr]
        for index, piece in _owned(unit, wanted, owner):
            transfers.append(
                Transfer(
                    fqn=wanted[index].fqn,
                    dtype=stored.dtype,
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
        for local in tensor.layout.local_pieces(piece, tensor.shape, owner):
            if unit.is_whole:
                yield index, local
            else:
                yield from ((index, part) for part in local.cut_source(unit.low, unit.high))
