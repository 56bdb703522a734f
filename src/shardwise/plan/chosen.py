"""Which tensors the ranks read together, because each of them alone would read much that is not its own, or very often."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.conversion import Piece
from shardwise.plan.boxes import shift_of
from shardwise.plan.wanted import WantedTensor

MAX_WASTE = 1.02
"""Bytes read over bytes needed, from which on a tensor is exchanged: the bound that a whole job keeps."""
SMALL_BYTES = 256 * 2**10
"""A rank's run of bytes below this is a small read."""
SMALL_TENSORS = 64
"""So many small runs in a row are read together."""

_JUDGED_RANKS = 64  # of very many, every so many-th one stands for the others


def exchanged(wanted: Sequence[WantedTensor], *, ranks: Sequence[int]) -> frozenset[int]:
    """Return which tensors the ranks read together, by index.

    Args:
        wanted: The tensors.
        ranks: Global ranks that take part.

    Returns:
        The same on every rank. One rank reads so what would be read several times, as the interleaved halves of one tensor.
    """
    judge = _Judge(ranks)
    chosen = {index for index, tensor in enumerate(wanted) if judge.is_wasteful(tensor)}
    if len(ranks) == 1:  # small tensors of one rank lie side by side, and become few reads anyway
        return frozenset(chosen)
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
            self._known[key] = self._wastes(tensor)
        return self._known[key]

    def _wastes(self, tensor: WantedTensor) -> bool:
        pieces = [each.piece for each in tensor.pieces]
        if tensor.layout.shards_rows_only and all(
            piece.is_one_run and shift_of(piece, tensor.shape) is not None for piece in pieces
        ):
            return False  # rows of such a piece are one run as well
        needed = spanned = 0
        for rank in self._ranks[:: max(1, len(self._ranks) // _JUDGED_RANKS)]:
            for piece in pieces:
                for local in tensor.layout.local_pieces(piece, tensor.shape, rank):
                    needed += local.numel
                    spanned += local.source_span
        return spanned > MAX_WASTE * needed

    def is_small(self, tensor: WantedTensor) -> bool:
        """Return whether the first rank's part of a tensor is runs of few bytes that are not mapped."""
        if tensor.always_mapped:
            return False
        pieces = list(tensor.pieces_on(tensor.layout.mesh_ranks[0]))
        nbytes = sum(each.piece.numel * each.stored.dtype.itemsize for each in pieces)
        return nbytes < SMALL_BYTES * max(1, len(pieces))
