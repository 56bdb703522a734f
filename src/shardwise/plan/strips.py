"""What ranks exchange of the stored tensors: runs of elements in file order, and who takes what of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardwise.checkpoint import StoredTensor
from shardwise.conversion import Piece
from shardwise.plan.layout import Layout
from shardwise.plan.wanted import WantedTensor

Taker = tuple[int, Piece]  # index into the wanted tensors, and what it takes of a whole stored tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """A run of a stored tensor's elements, and the tensors of the model that take from it.

    Args:
        stored: The tensor.
        low: First element, inclusive.
        high: Last element, exclusive.
        takers: Index into the wanted tensors, and the piece that it takes of the whole stored tensor.
        is_whole: Whether it is all that anybody takes of the stored tensor.
        weight: How many bytes its reader sends for each byte of it, at most: several ranks may keep copies.
    """

    stored: StoredTensor
    low: int
    high: int
    takers: tuple[Taker, ...]
    is_whole: bool
    weight: int

    @property
    def start(self) -> int:
        """First byte in the file."""
        return self.stored.start + self.low * self.stored.dtype.itemsize

    @property
    def stop(self) -> int:
        """Byte after the last one in the file."""
        return self.stored.start + self.high * self.stored.dtype.itemsize


def strips_of(
    wanted: Sequence[WantedTensor], chosen: frozenset[int], *, owners: Sequence[int]
) -> list[Strip]:
    """Return what some ranks take of the chosen tensors, in file order.

    Args:
        wanted: The tensors.
        chosen: Indices of those that are exchanged.
        owners: Global ranks that exchange them; what only others own is left out.
    """
    takers: dict[str, tuple[StoredTensor, list[Taker]]] = {}
    spans = _Spans(wanted, owners)
    sends = {
        id(layout): _sends(layout, owners) for layout in {id(t.layout): t.layout for t in wanted}.values()
    }
    for index in sorted(chosen):
        for each in wanted[index].pieces:
            takers.setdefault(each.stored.name, (each.stored, []))[1].append((index, each.piece))
    strips: list[Strip] = []
    for stored, of_stored in sorted(takers.values(), key=lambda item: (item[0].file, item[0].start)):
        whole = bounds_of(of_stored)
        sent = sum(piece.numel * sends[id(wanted[index].layout)] for index, piece in of_stored)
        weight = max(1, -(-sent // (whole[1] - whole[0])))
        of_all = tuple(of_stored)
        strips += (
            Strip(
                stored=stored,
                low=low,
                high=high,
                takers=of_all,
                is_whole=(low, high) == whole,
                weight=weight,
            )
            for low, high in spans.of(of_all)
        )
    return strips


def bounds_of(takers: Sequence[Taker]) -> tuple[int, int]:
    """Return the first element of a stored tensor that anybody takes, and the one after the last."""
    first = min(piece.source_start for _, piece in takers)
    last = max(piece.source_start + piece.source_span for _, piece in takers)
    return first, last


def _sends(layout: Layout, owners: Sequence[int]) -> int:
    """Return to how many of the owners a reader among them sends an element that they keep, at most."""
    everyone = frozenset(owners)
    if everyone.issuperset(layout.mesh_ranks):
        copies = layout.copies
    else:
        copies = max((len(everyone.intersection(ranks)) for ranks in layout.ranks_of_shards), default=0)
    return copies - 1 if copies == len(everyone) else copies  # the reader keeps one of them itself


class _Spans:
    """Finds which runs of a stored tensor's elements hold all that some ranks own of it.

    Args:
        wanted: The tensors.
        owners: Global ranks.
    """

    def __init__(self, wanted: Sequence[WantedTensor], owners: Sequence[int]) -> None:
        self._wanted = wanted
        self._owners = owners
        self._set = frozenset(owners)
        self._all_own: dict[int, bool] = {}  # by layout

    def of(self, takers: tuple[Taker, ...]) -> list[tuple[int, int]]:
        """Return half-open runs in order, no two of which touch."""
        if all(self._is_owned_by_all(index) for index, _ in takers):
            return [bounds_of(takers)]
        runs: list[tuple[int, int]] = []
        for first, last in sorted(self._owned(takers)):
            if runs and first <= runs[-1][1]:
                runs[-1] = (runs[-1][0], max(runs[-1][1], last))
            else:
                runs.append((first, last))
        return runs

    def _owned(self, takers: tuple[Taker, ...]) -> Iterator[tuple[int, int]]:
        for index, whole in takers:
            tensor = self._wanted[index]
            for owner in self._owners:
                for piece in tensor.layout.local_pieces(whole, tensor.shape, owner):
                    yield piece.source_start, piece.source_start + piece.source_span

    def _is_owned_by_all(self, index: int) -> bool:
        layout = self._wanted[index].layout
        if id(layout) not in self._all_own:
            self._all_own[id(layout)] = set(layout.mesh_ranks) <= self._set
        return self._all_own[id(layout)]
