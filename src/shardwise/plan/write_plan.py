"""What one rank writes of a checkpoint: the bytes of its own shards, each element by one of the ranks that keep it.

The way of a load, walked backwards. A tensor of the model is wanted by the files: its pieces say which bytes of them it
fills. Where a rank's part of a tensor is a few long runs of bytes, it writes these itself; two parts next to each other become
one write, but nothing in between may be written along, because it is another rank's. Where it would be many short runs, ranks
go through an exchange the other way round: the rank that would read a slice of the file for all gets everybody's pieces of
it, and writes it. So do ranks that do not see the directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from torch.distributed.tensor import Replicate

from shardwise.conversion import Piece
from shardwise.plan.exchange_plan import ExchangePlan, plan_exchange
from shardwise.plan.layout import Layout
from shardwise.plan.load_plan import Fragment, Read, coalesce, fragments_of
from shardwise.plan.wanted import WantedTensor

LEAST_RUN_BYTES = 64 * 2**10
"""Runs that are shorter than this on average are sent to a rank that writes long ones."""
FEW_RUNS = 4
"""So many runs of one tensor a rank writes itself, however short."""

_JUDGED_RANKS = 64  # of very many, every so many-th one stands for the others

Write = Read
"""One extent of a file and the pieces that it consists of, without gaps."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WritePlan:
    """What one rank writes, and what it sends to ranks that write for it.

    Args:
        rank: Global rank.
        writes: Of its own elements, in file order.
        exchange: In which the readers are those that write: what a rank would get of a slice, it sends.
    """

    rank: int
    writes: tuple[Write, ...]
    exchange: ExchangePlan

    @property
    def written_bytes(self) -> int:
        """Bytes that this rank writes."""
        return sum(write.nbytes for write in self.writes) + self.exchange.storage_bytes


def plan_writes(
    wanted: Sequence[WantedTensor],
    *,
    ranks: Sequence[int],
    rank: int,
    writers: Sequence[int],
    max_write_bytes: int,
    buffer_bytes: int,
) -> WritePlan:
    """Plan what one rank writes.

    Args:
        wanted: Tensors of the model that the files want, as `dealt` returned them; the same on all ranks.
        ranks: Global ranks that take part, in one order on all of them.
        rank: This one.
        writers: Those of them that see the files.
        max_write_bytes: Most bytes of one write; a staging buffer's size.
        buffer_bytes: Bound of what a rank sends or receives in one round of the exchange.
    """
    all_write = len(writers) == len(ranks)
    sent = _scattered(wanted, ranks) if all_write else frozenset(range(len(wanted)))
    fragments: list[tuple[str, Fragment]] = []
    for index, tensor in enumerate(wanted):
        if index not in sent:
            for each in tensor.pieces_on(rank):
                for piece in runs_of(each.piece):
                    fragments += (
                        (each.stored.file, fragment)
                        for fragment in fragments_of(tensor.fqn, each.stored, piece, max_write_bytes)
                    )
    return WritePlan(
        rank=rank,
        writes=tuple(coalesce(fragments, max_read_bytes=max_write_bytes, max_gap_bytes=0)),
        exchange=plan_exchange(
            wanted, sent, ranks=ranks, rank=rank, buffer_bytes=buffer_bytes, readers=writers
        ),
    )


def dealt(
    wanted: Sequence[WantedTensor], *, ranks: Sequence[int], writers: Sequence[int]
) -> list[WantedTensor]:
    """Return tensors each element of which one rank keeps: of copies, those of the ranks with the least to write so far.

    Args:
        wanted: With copies, and each of pieces of one stored tensor; the same on all ranks.
        ranks: Global ranks that take part.
        writers: Those of them that see the files; their copies go first.
    """
    load = dict.fromkeys(ranks, 0)  # bytes
    sees = frozenset(writers)
    found = []
    for tensor in wanted:
        candidates = _copies_of(tensor.layout)
        if len(candidates) > 1:
            near = [layout for layout in candidates if sees.issuperset(layout.mesh_ranks)]
            chosen = min(near or candidates, key=lambda layout: sum(load[r] for r in layout.mesh_ranks))
        else:
            chosen = candidates[0]
        nbytes = sum(each.piece.numel * each.stored.dtype.itemsize for each in tensor.pieces)
        for member in chosen.mesh_ranks:
            load[member] += nbytes // len(chosen.mesh_ranks)
        found.append(replace(tensor, layout=chosen))
    return found


@lru_cache(maxsize=256)
def _copies(
    mesh_shape: tuple[int, ...], mesh_ranks: tuple[int, ...], placements: tuple[object, ...]
) -> tuple[Layout, ...]:
    layout = Layout(mesh_shape=mesh_shape, mesh_ranks=mesh_ranks, placements=placements)  # type: ignore[arg-type]
    copied = [isinstance(placement, Replicate) for placement in layout.placements]
    members: dict[tuple[int, ...], list[int]] = {}
    for rank in layout.mesh_ranks:
        at = layout.coordinate(rank) or ()
        members.setdefault(tuple(i for i, of_copies in zip(at, copied, strict=True) if of_copies), []).append(
            rank
        )
    kept = [axis for axis, of_copies in enumerate(copied) if not of_copies]
    return tuple(
        Layout(
            mesh_shape=tuple(layout.mesh_shape[axis] for axis in kept) or (1,),
            mesh_ranks=tuple(of_copy),
            placements=tuple(layout.placements[axis] for axis in kept) or (Replicate(),),
        )
        for of_copy in members.values()
    )


def _copies_of(layout: Layout) -> tuple[Layout, ...]:
    """Return the layouts in which each element is kept once, one for each copy of the tensor."""
    return _copies(layout.mesh_shape, layout.mesh_ranks, layout.placements)


def dealt_layout(layout: Layout) -> Layout:
    """Return a layout in which each element is kept once: by the ranks of its first copy."""
    return _copies_of(layout)[0]


def run_numel(piece: Piece) -> int:
    """Return how many elements of a piece follow each other in its source without a gap, in whatever order of the target."""
    run = 1
    for stride, size in sorted(zip(piece.source_strides, piece.sizes, strict=True)):
        if stride != run:
            break
        run *= size
    return run


def runs_of(piece: Piece) -> Iterator[Piece]:
    """Cut a piece into runs of elements of its source, none of which has a gap."""
    return piece.cut_to_span(run_numel(piece))


def _scattered(wanted: Sequence[WantedTensor], ranks: Sequence[int]) -> frozenset[int]:
    """Return the tensors that ranks would write in many short runs, and those that share a stored tensor with them."""
    known: dict[tuple[int, tuple[int, ...], tuple[Piece, ...]], bool] = {}
    of_stored: dict[str, bool] = {}
    for tensor in wanted:
        pieces = tuple(each.piece for each in tensor.pieces)
        key = (id(tensor.layout), tensor.shape, pieces)
        if key not in known:
            known[key] = _is_scattered(tensor, pieces, ranks)
        for each in tensor.pieces:
            of_stored[each.stored.name] = of_stored.get(each.stored.name, False) or known[key]
    return frozenset(
        index
        for index, tensor in enumerate(wanted)
        if any(of_stored[each.stored.name] for each in tensor.pieces)
    )


def _is_scattered(tensor: WantedTensor, pieces: Sequence[Piece], ranks: Sequence[int]) -> bool:
    runs = elements = owners = 0
    for rank in ranks[:: max(1, len(ranks) // _JUDGED_RANKS)]:
        locals_of = [p for piece in pieces for p in tensor.layout.local_pieces(piece, tensor.shape, rank)]
        owners += bool(locals_of)
        elements += sum(piece.numel for piece in locals_of)
        runs += sum(piece.numel // run_numel(piece) for piece in locals_of)
    itemsize = max((each.stored.dtype.itemsize for each in tensor.pieces), default=1)
    return runs > FEW_RUNS * owners and elements * itemsize < LEAST_RUN_BYTES * runs


def unwritten(wanted: Sequence[WantedTensor], sizes: Mapping[str, int]) -> dict[str, int]:
    """Return stored tensors of which a plan takes another number of elements than they have, and that number.

    Args:
        wanted: The tensors.
        sizes: Elements of each stored tensor, by checkpoint name.
    """
    taken = dict.fromkeys(sizes, 0)
    for tensor in wanted:
        for each in tensor.pieces:
            taken[each.stored.name] += each.piece.numel
    return {name: count for name, count in taken.items() if count != sizes[name]}
