"""A tensor of the model, the stored tensors that it is made of, and what of them belongs to a rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from shardwise.checkpoint import StoredTensor
from shardwise.conversion import Piece, whole
from shardwise.plan.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPiece:
    """A piece of a tensor of the model, and the stored tensor that holds it."""

    stored: StoredTensor
    piece: Piece


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

    def pieces_on(self, rank: int) -> Iterator[StoredPiece]:
        """Yield what a rank owns of it; targets are places in its shard."""
        for each in self.pieces:
            for piece in self.layout.local_pieces(each.piece, self.shape, rank):
                yield StoredPiece(stored=each.stored, piece=piece)

    def mapped_on(self, rank: int) -> Mapped | None:
        """Return a rank's shard as pages of the file; None where it has to be copied.

        A shard that is smaller than the largest is padded by FSDP2, and the bytes after it in the file are not its own.
        """
        if not self.may_map or len(self.pieces) != 1 or self.pieces[0].stored.dtype != self.dtype:
            return None
        stored, itemsize = self.pieces[0].stored, self.dtype.itemsize
        run = self.layout.run_of(self.pieces[0].piece, self.shape, rank)
        if run is None:
            return None
        first = stored.start + itemsize * run.start
        if first % itemsize:
            return None
        return Mapped(fqn=self.fqn, file=stored.file, start=first, nbytes=len(run) * itemsize)

    @property
    def always_mapped(self) -> bool:
        """Whether every rank maps its shard: the first one does, and the last one's is not shorter."""
        first, last = self.layout.mesh_ranks[0], self.layout.mesh_ranks[-1]
        return self.mapped_on(first) is not None and self.mapped_on(last) is not None


def as_stored(stored: StoredTensor) -> tuple[StoredPiece, ...]:
    """Return the pieces of a tensor that is stored as the model has it."""
    return (StoredPiece(stored=stored, piece=whole(stored.shape)),) if stored.nbytes else ()
