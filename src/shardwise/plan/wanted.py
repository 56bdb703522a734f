"""A tensor of the model, the stored tensors that it is made of, and what of them belongs to a rank."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from shardwise.checkpoint import StoredTensor
from shardwise.conversion import Piece, whole
from shardwise.plan.layout import Layout

_PAGE_BYTES = mmap.PAGESIZE
_LEAST_STITCHED_BYTES = 2**17
"""Of a run, on average: shorter ones would be mostly the pages that are read, and a process may have 65,530 mappings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPiece:
    """A piece of a tensor of the model, and the stored tensor that holds it."""

    stored: StoredTensor
    piece: Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class MappedRun:
    """A run of bytes of a file.

    Args:
        file: Within the source.
        start: First byte, inclusive.
        stop: Last byte, exclusive.
    """

    file: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """A shard that is pages of files.

    Args:
        fqn: Of the tensor.
        runs: That follow each other in the shard; where they are several, their places in the file and in the shard differ by the
            same number of bytes modulo the page size, so that whole pages can lie side by side.
    """

    fqn: str
    runs: tuple[MappedRun, ...]

    @property
    def nbytes(self) -> int:
        """Of the shard."""
        return sum(run.stop - run.start for run in self.runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedTensor:
    """A tensor of the model and where its values are.

    Args:
        fqn: In the model.
        shape: Of the full tensor, in elements.
        dtype: In which the shard is kept.
        layout: How the full tensor lies over the ranks.
        pieces: Of stored tensors that together fill it once; none where it is empty.
        partial: Whether they fill only a part of it; the rest has its values from elsewhere, before these are read.
        may_map: Whether this rank's shard may be the file's own pages: host memory, no other tensor that takes the same
            bytes. The same on all ranks.
    """

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout
    pieces: tuple[StoredPiece, ...]
    partial: bool = False
    may_map: bool
    _mapped: dict[int, Mapped | None] = field(init=False, repr=False, compare=False, default_factory=dict)

    def pieces_on(self, rank: int) -> Iterator[StoredPiece]:
        """Yield what a rank owns of it; targets are places in its shard."""
        for each in self.pieces:
            for piece in self.layout.local_pieces(each.piece, self.shape, rank):
                yield StoredPiece(stored=each.stored, piece=piece)

    def mapped_on(self, rank: int) -> Mapped | None:
        """Return a rank's shard as pages of the file; None where it has to be copied.

        A shard that is smaller than the largest is padded by FSDP2, and the bytes after it in the file are not its own.
        """
        if rank not in self._mapped:
            self._mapped[rank] = self._found_mapped_on(rank)
        return self._mapped[rank]

    def _found_mapped_on(self, rank: int) -> Mapped | None:
        if not self.may_map or any(each.stored.dtype != self.dtype for each in self.pieces):
            return None
        if len(self.pieces) != 1:
            return self._stitched_on(rank)
        stored, itemsize = self.pieces[0].stored, self.dtype.itemsize
        run = self.layout.run_of(self.pieces[0].piece, self.shape, rank)
        if run is None:
            return None
        first = stored.start + itemsize * run.start
        if first % itemsize:
            return None
        of_file = MappedRun(file=stored.file, start=first, stop=first + len(run) * itemsize)
        return Mapped(fqn=self.fqn, runs=(of_file,))

    def _stitched_on(self, rank: int) -> Mapped | None:
        """Return a shard of several runs, as stacked experts are, each of many pages."""
        shape = self.layout.local_shape(self.shape, rank)
        if shape is None or shape != self.layout.local_shape(self.shape, self.layout.mesh_ranks[0]):
            return None
        itemsize = self.dtype.itemsize
        runs: list[
            tuple[int, int, str, int]
        ] = []  # in the shard: first and last byte; file, and first byte there
        for each in self.pieces_on(rank):
            place = each.piece.run_in(shape) if each.piece.is_one_run else None
            if place is None:
                return None
            start = each.stored.start + itemsize * each.piece.source_start
            runs.append((place.start * itemsize, place.stop * itemsize, each.stored.file, start))
        joined: list[MappedRun] = []
        at = 0
        for low, high, file, start in sorted(runs):
            if low != at or (start - low - runs[0][3] + runs[0][0]) % _PAGE_BYTES or start % itemsize:
                return None
            at = high
            if joined and (joined[-1].file, joined[-1].stop) == (file, start):
                joined[-1] = replace(joined[-1], stop=start + high - low)
            else:
                joined.append(MappedRun(file=file, start=start, stop=start + high - low))
        if not joined or at != math.prod(shape) * itemsize or at < _LEAST_STITCHED_BYTES * len(joined):
            return None
        return Mapped(fqn=self.fqn, runs=tuple(joined))

    @property
    def always_mapped(self) -> bool:
        """Whether every rank maps its shard: the first one does, and the last one's is not shorter."""
        first, last = self.layout.mesh_ranks[0], self.layout.mesh_ranks[-1]
        return self.mapped_on(first) is not None and self.mapped_on(last) is not None


def as_stored(stored: StoredTensor) -> tuple[StoredPiece, ...]:
    """Return the pieces of a tensor that is stored as the model has it."""
    return (StoredPiece(stored=stored, piece=whole(stored.shape)),) if stored.nbytes else ()
