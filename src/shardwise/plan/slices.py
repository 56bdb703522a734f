"""What the ranks read in an exchange: the bytes of the chosen tensors, cut into slices in file order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardwise.checkpoint import StoredTensor
from shardwise.conversion import Piece
from shardwise.plan.wanted import WantedTensor

_LEAST_BYTES = 16  # holds an element of any dtype

Taker = tuple[int, Piece]  # index into the wanted tensors, and what it takes of a whole stored tensor


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
    takers: tuple[Taker, ...]
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

    @property
    def nbytes(self) -> int:
        """Bytes read."""
        return self.stop - self.start


def slices_of(
    wanted: Sequence[WantedTensor],
    chosen: frozenset[int],
    *,
    owners: Sequence[int],
    buffer_bytes: int,
    readers: int,
) -> list[Slice]:
    """Cut the bytes that some ranks take of the chosen tensors into slices, in file order.

    A slice holds so little that three buffers suffice: it fits one itself; all that its reader sends of it fits one, also
    if several ranks keep copies; and what the slices of one round bring to one rank fits one, even if that is all of them.

    Args:
        wanted: The tensors.
        chosen: Indices of those that are exchanged.
        owners: Global ranks that exchange them; what only others own is not read.
        buffer_bytes: Size of each buffer, alignment aside.
        readers: How many ranks read in one round.
    """
    takers: dict[str, tuple[StoredTensor, list[Taker]]] = {}
    spans = _Spans(wanted, owners)
    for index in sorted(chosen):
        for each in wanted[index].pieces:
            takers.setdefault(each.stored.name, (each.stored, []))[1].append((index, each.piece))
    slices: list[Slice] = []
    pending: list[Unit] = []
    used_bytes = 0  # of the buffer that the pending units fill first

    def close() -> None:
        nonlocal used_bytes
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
            used_bytes = 0

    for stored, of_stored in sorted(takers.values(), key=lambda item: (item[0].file, item[0].start)):
        weight = _weight(wanted, of_stored, readers)
        for unit in _units(stored, tuple(of_stored), spans, max(_LEAST_BYTES, buffer_bytes // weight)):
            follows = (
                bool(pending) and pending[-1].stored.file == stored.file and pending[-1].stop == unit.start
            )
            more_bytes = (unit.stop - unit.start) * weight
            if not follows or used_bytes + more_bytes > buffer_bytes:
                close()
            pending.append(unit)
            used_bytes += more_bytes
    close()
    return slices


def _weight(wanted: Sequence[WantedTensor], takers: Sequence[Taker], readers: int) -> int:
    """Return how many bytes of the fullest buffer one byte of a stored tensor takes."""
    first, last = _bounds(takers)
    taken = sum(piece.numel for _, piece in takers)
    sent = sum(piece.numel * wanted[index].layout.copies for index, piece in takers)
    return max(readers * _times(taken, last - first), _times(sent, last - first))


def _times(taken: int, span: int) -> int:
    return max(1, -(-taken // span))


def _bounds(takers: Sequence[Taker]) -> tuple[int, int]:
    first = min(piece.source_start for _, piece in takers)
    last = max(piece.source_start + piece.source_span for _, piece in takers)
    return first, last


def _units(stored: StoredTensor, takers: tuple[Taker, ...], spans: _Spans, unit_bytes: int) -> Iterator[Unit]:
    step = unit_bytes // stored.dtype.itemsize
    whole = _bounds(takers)
    for first, last in spans.of(takers):
        for low in range(first, last, step):
            high = min(low + step, last)
            yield Unit(stored=stored, low=low, high=high, takers=takers, is_whole=(low, high) == whole)


class _Spans:
    """Finds which runs of a stored tensor's elements hold all that some ranks own of it.

    Args:
        wanted: The tensors.
        owners: Global ranks.
    """

    def __init__(self, wanted: Sequence[WantedTensor], owners: Sequence[int]) -> None:
        self._wanted = wanted
        self._owners = owners
        self._all_own: dict[int, bool] = {}  # by layout

    def of(self, takers: tuple[Taker, ...]) -> list[tuple[int, int]]:
        """Return half-open runs in order, no two of which touch."""
        if all(self._is_owned_by_all(index) for index, _ in takers):
            return [_bounds(takers)]
        found = sorted(
            (piece.source_start, piece.source_start + piece.source_span)
            for index, whole in takers
            for owner in self._owners
            for piece in self._wanted[index].layout.local_pieces(whole, self._wanted[index].shape, owner)
        )
        runs: list[tuple[int, int]] = []
        for first, last in found:
            if runs and first <= runs[-1][1]:
                runs[-1] = (runs[-1][0], max(runs[-1][1], last))
            else:
                runs.append((first, last))
        return runs

    def _is_owned_by_all(self, index: int) -> bool:
        layout = self._wanted[index].layout
        if id(layout) not in self._all_own:
            self._all_own[id(layout)] = set(layout.mesh_ranks) <= set(self._owners)
        return self._all_own[id(layout)]
