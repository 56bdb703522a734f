"""Tensors that ranks read together: each byte is read once, by one rank, and handed to the ranks that own it.

Two kinds of tensor go this way. A rank's part may be many short runs of bytes, as of a shard on a dim other than 0 or of a
transposed weight, so that every rank would read nearly the whole tensor to get its elements. And thousands of small parts
would be as many small reads on every rank. Their bytes are cut into slices in file order, dealt out to the ranks in turn,
and exchanged in rounds: in one round each rank reads one slice and one all-to-all moves the pieces. Where one rank alone
holds the bytes, it reads all slices.

A plan keeps the slices and what they bring to this rank in all. Rounds are made when they are carried out: of all ranks'
messages together they are N times as many as one rank's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

from shardwise.conversion import Piece
from shardwise.plan.boxes import aligned
from shardwise.plan.slices import Slice, Unit, slices_of
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
        read: What it reads; None where the slices ran out.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangePlan:
    """One rank's part in an exchange.

    Args:
        wanted: The tensors; the same on all ranks.
        ranks: Global ranks that take part.
        rank: This one.
        of_reader: What each rank reads, in the order of `ranks`, one slice in each round.
        arriving: Elements that reach this rank's shards, by fqn, with those that it reads itself.
        network_bytes: Of messages from other ranks, alignment included.
    """

    wanted: tuple[WantedTensor, ...]
    ranks: tuple[int, ...]
    rank: int
    of_reader: tuple[tuple[Slice, ...], ...]
    arriving: Mapping[str, int]
    network_bytes: int

    def __len__(self) -> int:
        """Return the number of rounds, equal on every rank."""
        return max(len(slices) for slices in self.of_reader)

    @property
    def storage_bytes(self) -> int:
        """Bytes that this rank requests."""
        return sum(each.nbytes for each in self.of_reader[self.ranks.index(self.rank)])

    def rounds(self) -> Iterator[Round]:
        """Yield this rank's part in each round, in order."""
        own = self.ranks.index(self.rank)
        for of_round in zip_longest(*self.of_reader):
            read = of_round[own]
            outgoing: list[tuple[Transfer, ...]] = []
            incoming: list[tuple[Transfer, ...]] = []
            for position, other in enumerate(self.ranks):
                of_other = of_round[position]
                outgoing.append(_transfers(read, self.wanted, other) if position != own else ())
                incoming.append(_transfers(of_other, self.wanted, self.rank) if position != own else ())
            yield Round(
                read=read,
                kept=_transfers(read, self.wanted, self.rank),
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

    Returns:
        The plan.
    """
    slices = slices_of(wanted, chosen, owners=ranks, buffer_bytes=buffer_bytes, readers=len(readers))
    own = list(ranks).index(rank)
    position_of = {reader: list(ranks).index(reader) for reader in readers}
    of_reader: list[list[Slice]] = [[] for _ in ranks]
    arriving: dict[str, int] = {}
    network_bytes = 0
    for number, each in enumerate(slices):
        global_reader = reader_of(each.file) if reader_of is not None else readers[number % len(readers)]
        reader = position_of[global_reader]
        of_reader[reader].append(each)
        message = _transfers(each, wanted, rank)
        network_bytes += _length(message) if reader != own else 0
        for transfer in message:
            arriving[transfer.fqn] = arriving.get(transfer.fqn, 0) + transfer.piece.numel
    return ExchangePlan(
        wanted=tuple(wanted),
        ranks=tuple(ranks),
        rank=rank,
        of_reader=tuple(map(tuple, of_reader)),
        arriving=arriving,
        network_bytes=network_bytes,
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
