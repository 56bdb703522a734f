"""What one rank reads of a checkpoint, and where each byte lands.

What a rank owns of the stored tensors becomes fragments: pieces whose bytes in the file span no more than one staging
buffer. Small fragments that lie close together in a file become one read. A shard that is one run of bytes in the file can be
mapped instead, if its place allows it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardwise.checkpoint import StoredTensor
from shardwise.conversion import Piece
from shardwise.errors import ConfigurationError
from shardwise.plan.chosen import MAX_WASTE
from shardwise.plan.wanted import Mapped, WantedTensor

MAX_GAP_BYTES = 4096
"""Bytes between two small fragments that are read along rather than skipped: one page of the page cache."""
LARGE_FRAGMENT_BYTES = 256 * 2**10
"""A fragment of this size is a read of its own: it may go straight into place, and joining saves nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """A piece of a shard, as elements in a file.

    Args:
        fqn: Of the tensor.
        stored: That it is a part of.
        start: First byte in the file, inclusive.
        stop: Last byte in the file, exclusive; bytes of other elements may lie between.
        piece: Its elements; targets are places in the shard.
    """

    fqn: str
    stored: StoredTensor
    start: int
    stop: int
    piece: Piece

    @property
    def needed_bytes(self) -> int:
        """Bytes of its elements."""
        return self.piece.numel * self.stored.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """One extent of a file and what it holds.

    Args:
        file: Within the source.
        start: First byte, inclusive.
        stop: Last byte, exclusive.
        fragments: In file order; between two of them there may be a gap.
    """

    file: str
    start: int
    stop: int
    fragments: tuple[Fragment, ...]

    @property
    def nbytes(self) -> int:
        """Bytes requested."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPlan:
    """What one rank reads.

    Args:
        rank: Global rank.
        mapped: Shards that need no reading.
        reads: In file order.
        shared: Fqns of the mapped shards whose bytes are counted elsewhere: another rank of the node maps the same pages, or
            this rank reads them for others.
    """

    rank: int
    mapped: tuple[Mapped, ...]
    reads: tuple[Read, ...]
    shared: frozenset[str] = frozenset()

    @property
    def mapped_bytes(self) -> int:
        """Bytes of mapped shards; pages that several ranks of a node map are counted by the first of them."""
        return sum(mapped.nbytes for mapped in self.mapped if mapped.fqn not in self.shared)

    @property
    def storage_bytes(self) -> int:
        """Bytes requested from storage, mapped ones included."""
        return sum(read.nbytes for read in self.reads) + self.mapped_bytes


def plan_reads(
    wanted: Sequence[WantedTensor],
    *,
    rank: int,
    max_read_bytes: int,
    max_gap_bytes: int = MAX_GAP_BYTES,
    joins_runs: bool = False,
    node_of: Mapping[int, str] | None = None,
) -> ReadPlan:
    """Plan what one rank reads so that it holds its parts of all tensors.

    Args:
        wanted: The tensors; the same on all ranks but for `may_map`.
        rank: Global rank.
        max_read_bytes: Largest read, in bytes; a staging buffer's size.
        max_gap_bytes: Largest number of unwanted bytes between two fragments of one read.
        joins_runs: Whether large fragments that follow each other without a gap are one read too, where all pass through buffers.
        node_of: Name of each rank's node; None: all ranks are on nodes of their own.

    Returns:
        The plan.

    Raises:
        ConfigurationError: `max_read_bytes` is smaller than one element.
    """
    if max_read_bytes < 16:
        raise ConfigurationError(f"plan_reads: expected max_read_bytes of at least 16, got {max_read_bytes}")
    mapped: list[Mapped] = []
    shared: set[str] = set()
    fragments: list[tuple[str, Fragment]] = []
    for tensor in wanted:
        found = tensor.mapped_on(rank)
        if found is not None:
            mapped.append(found)
            if node_of is not None and tensor.layout.copies > 1:
                on_node = [r for r in tensor.layout.replicas(rank) if node_of.get(r) == node_of.get(rank)]
                shared |= {tensor.fqn} if on_node[0] != rank else set()
            continue
        for each in tensor.pieces_on(rank):
            fragments += (
                (each.stored.file, fragment)
                for fragment in fragments_of(tensor.fqn, each.stored, each.piece, max_read_bytes)
            )
    return ReadPlan(
        rank=rank,
        mapped=tuple(mapped),
        reads=tuple(
            coalesce(
                fragments,
                max_read_bytes=max_read_bytes,
                max_gap_bytes=max_gap_bytes,
                joins_runs=joins_runs,
            )
        ),
        shared=frozenset(shared),
    )


def buffers_wanted(plans: Sequence[ReadPlan], *, most: int, nbytes: int) -> int:
    """Return how many buffers a rank's reads keep in use: little is read through few of them.

    Args:
        plans: Of a rank, all of whose reads pass through buffers.
        most: Number of buffers that there may be.
        nbytes: Size of each.
    """
    reads = [read for plan in plans for read in plan.reads]
    filled = -(-sum(read.nbytes for read in reads) // nbytes)
    return min(most, len(reads), filled + 1)


def mapped_of_reader(
    wanted: Sequence[WantedTensor],
    chosen: Collection[int],
    *,
    ranks: Sequence[int],
    readers: Sequence[int],
    rank: int,
) -> tuple[Mapped, ...]:
    """Return what a rank maps of its own shards although it reads for others: the only one of them that does.

    Args:
        wanted: The tensors.
        chosen: Indices of those that the ranks exchange.
        ranks: Global ranks that exchange them.
        readers: Those of them that read.
        rank: Global rank.
    """
    if tuple(readers) != (rank,) or len(ranks) == 1:
        return ()
    found = (wanted[index].mapped_on(rank) for index in sorted(chosen))
    return tuple(mapped for mapped in found if mapped is not None)


def coalesce(
    fragments: Sequence[tuple[str, Fragment]],
    *,
    max_read_bytes: int,
    max_gap_bytes: int,
    joins_runs: bool = False,
) -> Iterator[Read]:
    """Join fragments that lie close together in one file, as long as little is read that nobody wants.

    Args:
        fragments: With their file, in any order.
        max_read_bytes: Largest read, in bytes.
        max_gap_bytes: Largest number of unwanted bytes between two fragments of one read; all of them together are at most
            what `MAX_WASTE` allows.
        joins_runs: Whether large fragments without a gap between them are joined too.

    Yields:
        Reads in file order.
    """
    pending: list[Fragment] = []
    file, start, stop, needed = "", 0, 0, 0  # bytes
    for name, fragment in sorted(fragments, key=lambda item: (item[0], item[1].start, item[1].stop)):
        joins = (
            bool(pending)
            and name == file
            and fragment.start - stop <= max_gap_bytes
            and max(stop, fragment.stop) - start
            <= min(max_read_bytes, MAX_WASTE * (needed + fragment.needed_bytes))
            and (
                min(stop - start, fragment.stop - fragment.start) < LARGE_FRAGMENT_BYTES
                or (joins_runs and fragment.start == stop)
            )
        )
        if not joins:
            if pending:
                yield Read(file=file, start=start, stop=stop, fragments=tuple(pending))
            pending, file, start, stop, needed = [], name, fragment.start, fragment.start, 0
        pending.append(fragment)
        needed += fragment.needed_bytes
        stop = max(stop, fragment.stop)
    if pending:
        yield Read(file=file, start=start, stop=stop, fragments=tuple(pending))


def fragments_of(fqn: str, stored: StoredTensor, piece: Piece, max_read_bytes: int) -> Iterator[Fragment]:
    """Cut a piece of a stored tensor into fragments of at most `max_read_bytes` from first to last byte."""
    itemsize = stored.dtype.itemsize
    for part in piece.cut_to_span(max_read_bytes // itemsize):
        first = stored.start + itemsize * part.source_start
        yield Fragment(
            fqn=fqn, stored=stored, start=first, stop=first + itemsize * part.source_span, piece=part
        )
