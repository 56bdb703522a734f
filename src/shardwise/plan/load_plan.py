"""What one rank reads of a checkpoint, and where each byte lands.

A tensor's part that a rank owns becomes fragments: boxes whose bytes in the file span no more than one staging buffer.
Small fragments that lie close together in a file become one read. A part that is one run of bytes in the file and the
whole of the rank's shard can be mapped instead, if its place allows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from shardwise.checkpoint import StoredTensor
from shardwise.errors import ConfigurationError
from shardwise.plan.boxes import cut, offset_of, row_major_strides, span
from shardwise.plan.layout import Layout, Part
from shardwise.tensors import Region

MAX_GAP_BYTES = 4096
"""Bytes between two small fragments that are read along rather than skipped: one page of the page cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedTensor:
    """A tensor of the model and the tensor of the checkpoint that holds its values.

    Args:
        fqn: In the model.
        stored: Where the values are; of the full tensor's shape.
        dtype: In which the shard is kept.
        layout: How the full tensor lies over the ranks.
        may_map: Whether this rank's shard may be the file's own pages: host memory, no padding, no other tensor that
            takes the same bytes. The same on all ranks.
    """

    fqn: str
    stored: StoredTensor
    dtype: torch.dtype
    layout: Layout
    may_map: bool

    def mapped_on(self, rank: int) -> Mapped | None:
        """Return a rank's shard as pages of the file; None where it has to be copied.

        A shard that is smaller than the largest is padded by FSDP2, and the bytes after it in the file are not its own.
        """
        stored, itemsize = self.stored, self.stored.dtype.itemsize
        if not self.may_map or self.dtype != stored.dtype:
            return None
        parts = self.layout.parts(stored.shape, rank)
        if len(parts) != 1:
            return None
        region = parts[0].region
        if region.shape != self.layout.local_shape(stored.shape, self.layout.mesh_ranks[0]):
            return None
        strides = row_major_strides(stored.shape)
        first = stored.start + itemsize * offset_of(region.start, strides)
        if span(region.shape, strides) != region.numel or first % itemsize:
            return None
        return Mapped(fqn=self.fqn, file=stored.file, start=first, nbytes=region.numel * itemsize)

    @property
    def always_mapped(self) -> bool:
        """Whether every rank maps its shard: the first one does, and the last one's is not shorter."""
        first, last = self.layout.mesh_ranks[0], self.layout.mesh_ranks[-1]
        return self.mapped_on(first) is not None and self.mapped_on(last) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """A box of a shard, as strided elements in a file.

    Args:
        fqn: Of the tensor.
        start: First byte in the file, inclusive.
        stop: Last byte in the file, exclusive; bytes of other elements may lie between.
        strides: Of the stored tensor, per dim, in elements.
        local: The box in the shard, in elements.
    """

    fqn: str
    start: int
    stop: int
    strides: tuple[int, ...]
    local: Region


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
class Mapped:
    """A shard that is the file's own pages.

    Args:
        fqn: Of the tensor.
        file: Within the source.
        start: First byte, inclusive.
        nbytes: Of the shard.
    """

    fqn: str
    file: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What one rank reads.

    Args:
        rank: Global rank.
        mapped: Shards that need no reading.
        reads: In file order.
    """

    rank: int
    mapped: tuple[Mapped, ...]
    reads: tuple[Read, ...]

    @property
    def storage_bytes(self) -> int:
        """Bytes requested from storage, mapped ones included."""
        return sum(read.nbytes for read in self.reads) + sum(mapped.nbytes for mapped in self.mapped)


def plan_load(
    wanted: Sequence[WantedTensor], *, rank: int, max_read_bytes: int, max_gap_bytes: int = MAX_GAP_BYTES
) -> LoadPlan:
    """Plan what one rank reads so that it holds its parts of all tensors.

    Args:
        wanted: The tensors; the same on all ranks but for `may_map`.
        rank: Global rank.
        max_read_bytes: Largest read, in bytes; a staging buffer's size.
        max_gap_bytes: Largest number of unwanted bytes between two fragments of one read.

    Returns:
        The plan.

    Raises:
        ConfigurationError: `max_read_bytes` is smaller than one element.
    """
    if max_read_bytes < 16:
        raise ConfigurationError(f"plan_load: expected max_read_bytes of at least 16, got {max_read_bytes}")
    mapped: list[Mapped] = []
    fragments: list[tuple[str, Fragment]] = []
    for tensor in wanted:
        found = tensor.mapped_on(rank)
        if found is not None:
            mapped.append(found)
            continue
        for part in tensor.layout.parts(tensor.stored.shape, rank):
            fragments += (
                (tensor.stored.file, f) for f in fragments_of(tensor.fqn, tensor.stored, part, max_read_bytes)
            )
    return LoadPlan(
        rank=rank,
        mapped=tuple(mapped),
        reads=tuple(coalesce(fragments, max_read_bytes=max_read_bytes, max_gap_bytes=max_gap_bytes)),
    )


def coalesce(
    fragments: Sequence[tuple[str, Fragment]], *, max_read_bytes: int, max_gap_bytes: int
) -> Iterator[Read]:
    """Join fragments that lie close together in one file.

    Args:
        fragments: With their file, in any order.
        max_read_bytes: Largest read, in bytes.
        max_gap_bytes: Largest number of unwanted bytes between two fragments of one read.

    Yields:
        Reads in file order.
    """
    pending: list[Fragment] = []
    file, start, stop = "", 0, 0
    for name, fragment in sorted(fragments, key=lambda item: (item[0], item[1].start, item[1].stop)):
        joins = (
            bool(pending)
            and name == file
            and fragment.start - stop <= max_gap_bytes
            and max(stop, fragment.stop) - start <= max_read_bytes
        )
        if not joins:
            if pending:
                yield Read(file=file, start=start, stop=stop, fragments=tuple(pending))
            pending, file, start, stop = [], name, fragment.start, fragment.start
        pending.append(fragment)
        stop = max(stop, fragment.stop)
    if pending:
        yield Read(file=file, start=start, stop=stop, fragments=tuple(pending))


def fragments_of(fqn: str, stored: StoredTensor, part: Part, max_read_bytes: int) -> Iterator[Fragment]:
    """Cut a part of a tensor into fragments of at most `max_read_bytes` from first to last byte."""
    strides = row_major_strides(stored.shape)
    itemsize = stored.dtype.itemsize
    for region in cut(part.region, strides, max_read_bytes // itemsize):
        first = stored.start + itemsize * offset_of(region.start, strides)
        yield Fragment(
            fqn=fqn,
            start=first,
            stop=first + itemsize * span(region.shape, strides),
            strides=strides,
            local=part.local_of(region),
        )
