"""Tensors that ranks read together: each byte is read once, by one rank, and handed to the ranks that own it.

Two kinds of tensor go this way. A shard on a dim other than 0 is many short runs of bytes, so that every rank would read
nearly the whole tensor to get its columns. And thousands of small tensors would be as many small reads on every rank.
Their bytes are cut into slices in file order, dealt out to the ranks in turn, and exchanged in rounds: in one round
each rank reads one slice and one all-to-all moves the pieces. A slice holds so little that whatever goes to one rank in
a round fits its receive buffer, even if every piece went there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from shardwise.plan.boxes import aligned, cut, offset_of, row_major_strides, span
from shardwise.plan.layout import Part
from shardwise.plan.load_plan import WantedTensor
from shardwise.tensors import Region

MAX_WASTE = 1.02
"""Bytes read over bytes needed, from which on a tensor is exchanged: the bound that a whole job keeps."""
SMALL_BYTES = 256 * 2**10
"""A rank's part below this is a small read."""
SMALL_TENSORS = 64
"""So many small tensors in a row are read together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A run of bytes of one tensor.

    Args:
        tensor: Index into the wanted tensors.
        region: In the full tensor; contiguous in the file.
        start: First byte in the file.
        nbytes: Length.
    """

    tensor: int
    region: Region
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What one rank reads in one round: units that follow each other in one file."""

    file: str
    start: int
    stop: int
    units: tuple[Unit, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A piece of the slice that a rank has read, for one owner.

    Args:
        dtype: As stored.
        shape: Of the piece, in elements.
        strides: In the slice, in elements.
        slice_offset: Of its first element, in bytes.
        message_offset: Where it goes in the message, in bytes; aligned.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    slice_offset: int
    message_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """A piece of a message and its place in this rank's shard.

    Args:
        fqn: Of the tensor.
        dtype: As stored.
        local: The box in the shard, in elements.
        message_offset: In bytes.
    """

    fqn: str
    dtype: torch.dtype
    local: Region
    message_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One rank's part in one round.

    Args:
        position: Of this rank, in the order of the plan's ranks.
        read: What it reads; None where the slices ran out.
        outgoing: For each rank, in the order of the plan's ranks.
        incoming: From each rank, in the same order.
        send_bytes: Length of the message to each rank.
        receive_bytes: Length of the message from each rank.
    """

    position: int
    read: Slice | None
    outgoing: tuple[tuple[Outgoing, ...], ...]
    incoming: tuple[tuple[Incoming, ...], ...]
    send_bytes: tuple[int, ...]
    receive_bytes: tuple[int, ...]


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
    chosen = {index for index, tensor in enumerate(wanted) if _is_wasteful(tensor, ranks)}
    small: list[int] = []
    for index in sorted(range(len(wanted)), key=lambda i: (wanted[i].stored.file, wanted[i].stored.start)):
        if wanted[index].stored.nbytes == 0:  # lies nowhere, so it ends no run
            continue
        if index in chosen or not _is_small(wanted[index]):
            chosen |= _run(small)
            small = []
        else:
            small.append(index)
    return frozenset(chosen | _run(small))


def _run(small: list[int]) -> set[int]:
    return set(small) if len(small) >= SMALL_TENSORS else set()


def _is_small(tensor: WantedTensor) -> bool:
    if tensor.always_mapped:
        return False
    shape = tensor.layout.local_shape(tensor.stored.shape, tensor.layout.mesh_ranks[0])
    return shape is not None and Region.whole(shape).numel * tensor.stored.dtype.itemsize < SMALL_BYTES


def _is_wasteful(tensor: WantedTensor, ranks: Sequence[int]) -> bool:
    if tensor.layout.shards_rows_only:  # runs of rows are runs of bytes
        return False
    strides = row_major_strides(tensor.stored.shape)
    needed = spanned = 0
    for rank in ranks:
        for part in tensor.layout.parts(tensor.stored.shape, rank):
            needed += part.region.numel
            spanned += span(part.region.shape, strides)
    return spanned > MAX_WASTE * needed


def slices_of(wanted: Sequence[WantedTensor], chosen: frozenset[int], *, slice_bytes: int) -> list[Slice]:
    """Cut the bytes of the chosen tensors into slices, in file order."""
    order = sorted(chosen, key=lambda i: (wanted[i].stored.file, wanted[i].stored.start))
    slices: list[Slice] = []
    pending: list[Unit] = []
    file = ""

    def close() -> None:
        if pending:
            last = pending[-1]
            slices.append(
                Slice(file=file, start=pending[0].start, stop=last.start + last.nbytes, units=tuple(pending))
            )
            pending.clear()

    for index in order:
        stored = wanted[index].stored
        for unit in _units(index, wanted[index], slice_bytes):
            follows = (
                bool(pending) and file == stored.file and pending[-1].start + pending[-1].nbytes == unit.start
            )
            if not follows or unit.start + unit.nbytes - pending[0].start > slice_bytes:
                close()
            file = stored.file
            pending.append(unit)
    close()
    return slices


def _units(index: int, tensor: WantedTensor, slice_bytes: int) -> Iterator[Unit]:
    stored = tensor.stored
    strides, itemsize = row_major_strides(stored.shape), stored.dtype.itemsize
    for region in cut(Region.whole(stored.shape), strides, slice_bytes // itemsize):
        first = offset_of(region.start, strides)
        yield Unit(
            tensor=index,
            region=region,
            start=stored.start + first * itemsize,
            nbytes=region.numel * itemsize,
        )


def plan_rounds(
    wanted: Sequence[WantedTensor],
    chosen: frozenset[int],
    *,
    ranks: Sequence[int],
    rank: int,
    buffer_bytes: int,
    readers: int | None = None,
) -> Iterator[Round]:
    """Plan one rank's part in the exchange.

    Args:
        wanted: The tensors; the same on all ranks.
        chosen: As `exchanged` returned.
        ranks: Global ranks that take part.
        rank: This one.
        buffer_bytes: Bound of what a rank reads, sends or receives in one round, in bytes, alignment aside.
        readers: How many of the first ranks read; None is all. The first alone may hold a state dict.

    Yields:
        Rounds in order; equally many on every rank.
    """
    slices = slices_of(wanted, chosen, slice_bytes=max(16, buffer_bytes // len(ranks)))
    parts = {
        index: tuple(wanted[index].layout.parts(wanted[index].stored.shape, owner) for owner in ranks)
        for index in chosen
    }
    own = list(ranks).index(rank)
    readers = len(ranks) if readers is None else readers
    for first in range(0, len(slices), readers):
        of_round = slices[first : first + readers]
        read = of_round[own] if own < len(of_round) else None
        outgoing, send_bytes = [], []
        for owner in range(len(ranks)):
            pieces, length = _outgoing(read, wanted, parts, owner)
            outgoing.append(pieces)
            send_bytes.append(length)
        incoming, receive_bytes = [], []
        for reader in range(len(ranks)):
            of_reader = of_round[reader] if reader < len(of_round) else None
            arriving, length = _incoming(of_reader, wanted, parts, own)
            incoming.append(arriving)
            receive_bytes.append(length)
        yield Round(
            position=own,
            read=read,
            outgoing=tuple(outgoing),
            incoming=tuple(incoming),
            send_bytes=tuple(send_bytes),
            receive_bytes=tuple(receive_bytes),
        )


Parts = dict[int, tuple[tuple[Part, ...], ...]]


def _overlaps(
    read: Slice | None, wanted: Sequence[WantedTensor], parts: Parts, owner: int
) -> Iterator[tuple[Unit, Part, Region, int]]:
    """Yield unit, part, their common region and its place in the message, in the order of the message."""
    offset = 0
    for unit in read.units if read is not None else ():
        for part in parts[unit.tensor][owner]:
            common = unit.region.intersect(part.region)
            if common is not None:
                yield unit, part, common, offset
                offset = aligned(offset + common.numel * wanted[unit.tensor].stored.dtype.itemsize)


def _outgoing(
    read: Slice | None, wanted: Sequence[WantedTensor], parts: Parts, owner: int
) -> tuple[tuple[Outgoing, ...], int]:
    pieces, length = [], 0
    for unit, _, common, offset in _overlaps(read, wanted, parts, owner):
        stored = wanted[unit.tensor].stored
        strides = row_major_strides(stored.shape)
        inside = offset_of(common.relative_to(unit.region).start, strides)
        pieces.append(
            Outgoing(
                dtype=stored.dtype,
                shape=common.shape,
                strides=strides,
                slice_offset=unit.start - read.start + inside * stored.dtype.itemsize
                if read is not None
                else 0,
                message_offset=offset,
            )
        )
        length = offset + common.numel * stored.dtype.itemsize
    return tuple(pieces), aligned(length)


def _incoming(
    read: Slice | None, wanted: Sequence[WantedTensor], parts: Parts, owner: int
) -> tuple[tuple[Incoming, ...], int]:
    pieces, length = [], 0
    for unit, part, common, offset in _overlaps(read, wanted, parts, owner):
        dtype = wanted[unit.tensor].stored.dtype
        pieces.append(
            Incoming(
                fqn=wanted[unit.tensor].fqn,
                dtype=dtype,
                local=part.local_of(common),
                message_offset=offset,
            )
        )
        length = offset + common.numel * dtype.itemsize
    return tuple(pieces), aligned(length)
