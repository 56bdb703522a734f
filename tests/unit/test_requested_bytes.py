"""What all ranks request together, and whom each element reaches, for any mesh and placements: plans alone, no group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

from shardwise.checkpoint import StoredTensor
from shardwise.conversion.tracing import TracedTensor
from shardwise.materialization.placing import place_in
from shardwise.plan import Layout, StoredPiece, WantedTensor, exchanged, plan_exchange, plan_reads
from tests.unit.test_load_plan import Case, checkpoints, empty_shard, wanted_tensors

MAX_WASTE = 1.02  # as published


def carried_out(
    wanted: Sequence[WantedTensor], ranks: Sequence[int], *, max_read_bytes: int
) -> tuple[int, dict[tuple[int, str], torch.Tensor]]:
    """Return the bytes that a job requests, and how often each element of each rank's shards arrives."""
    together = exchanged(wanted, ranks=ranks)
    alone = [tensor for index, tensor in enumerate(wanted) if index not in together]
    arrivals = {(rank, t.fqn): empty_shard(t, rank).to(torch.int64) for rank in ranks for t in wanted}
    requested = 0
    for rank in ranks:
        direct = plan_reads(alone, rank=rank, max_read_bytes=max_read_bytes)
        exchange = plan_exchange(
            wanted, together, ranks=ranks, rank=rank, buffer_bytes=max_read_bytes, readers=ranks
        )
        requested += direct.storage_bytes + exchange.storage_bytes
        for mapped in direct.mapped:
            arrivals[rank, mapped.fqn] += 1
        for read in direct.reads:
            for fragment in read.fragments:
                place_in(arrivals[rank, fragment.fqn], fragment.piece).add_(1)
        for turn in exchange.rounds():
            for transfer in (*turn.kept, *(each for message in turn.incoming for each in message)):
                place_in(arrivals[rank, transfer.fqn], transfer.piece).add_(1)
    return requested, arrivals


def bound(wanted: Sequence[WantedTensor]) -> float:
    """1.02 times the checkpoint; what is kept in several places, or on several ranks, counts once for each of them."""
    total = 0
    for tensor in wanted:
        stored = sum({each.stored.name: each.stored.nbytes for each in tensor.pieces}.values())
        kept = sum(each.piece.numel * each.stored.dtype.itemsize for each in tensor.pieces)
        total += tensor.layout.copies * max(stored, kept)
    return MAX_WASTE * total


@given(case=checkpoints(), max_read_bytes=st.sampled_from([64, 300, 10_000]))
@settings(max_examples=300)
def test_each_element_reaches_each_of_its_owners_once_and_no_byte_is_read_in_vain(
    case: Case, max_read_bytes: int
) -> None:
    requested, arrivals = carried_out(case.wanted, case.ranks, max_read_bytes=max_read_bytes)
    for (rank, fqn), counts in arrivals.items():
        assert counts.eq(1).all(), (rank, fqn)
    # A shard's shape is its owner's, so what arrives is owned; and together the owners hold every element.
    for tensor in case.wanted:
        owned = sum(arrivals[rank, tensor.fqn].numel() for rank in case.ranks)
        assert owned == tensor.layout.copies * torch.Size(tensor.shape).numel()
    assert requested <= bound(case.wanted)


# Rows of tensors of one size: few and many, small and large, with gaps below and above one page.
ROWS = [
    (count, shape)
    for count in (1, 7, 63, 64, 200)
    for shape in ((1, 3), (3, 5), (8, 16), (31, 60), (128, 8), (250, 700))
    if count * shape[0] * shape[1] < 500_000
]


@pytest.mark.parametrize(("count", "shape"), ROWS, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_of_equal_tensors(count: int, shape: tuple[int, ...], ranks: int, dim: int) -> None:
    wanted = wanted_tensors(count, shape, Shard(dim), ranks=ranks)
    requested, _ = carried_out(wanted, range(ranks), max_read_bytes=2**20)
    assert requested <= bound(wanted)


@example(sizes=[5000, 3, 5000, 4, 4, 4, 5000], ranks=4)
@given(sizes=st.lists(st.integers(0, 6000), min_size=1, max_size=80), ranks=st.integers(1, 5))
@settings(max_examples=100)
def test_tensors_of_any_sizes_one_after_the_other(sizes: list[int], ranks: int) -> None:
    wanted: list[WantedTensor] = []
    position = 0
    for index, rows in enumerate(sizes):
        (one,) = wanted_tensors(1, (rows,), Shard(0), ranks=ranks)
        (piece,) = one.pieces or (None,)
        if piece is None:  # nothing in it
            continue
        stored = replace(piece.stored, name=f"t{index}", start=position, stop=position + piece.stored.nbytes)
        position = stored.stop
        wanted.append(replace(one, fqn=f"t{index}", pieces=(replace(piece, stored=stored),)))
    requested, arrivals = carried_out(wanted, range(ranks), max_read_bytes=2**20)
    assert all(counts.eq(1).all() for counts in arrivals.values())
    assert requested <= bound(wanted)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_interleaved_halves_of_one_tensor_are_read_once(ranks: int) -> None:
    stored = StoredTensor(name="both", shape=(30, 8), dtype=torch.float32, file="f", start=0, stop=960)
    layout = Layout(mesh_shape=(ranks,), mesh_ranks=tuple(range(ranks)), placements=(Shard(0),))
    traced = TracedTensor.of_source(stored.name, stored.shape, stored.dtype)
    wanted = []
    for name, half in zip("ab", torch.chunk(traced, 2, dim=1), strict=True):
        assert isinstance(half, TracedTensor)
        pieces = tuple(StoredPiece(stored=stored, piece=part.piece) for part in half.parts)
        wanted.append(
            WantedTensor(
                fqn=name,
                shape=(30, 4),
                dtype=torch.float32,
                layout=layout,
                pieces=pieces,
                may_map=False,
                partial=False,
            )
        )
    requested, arrivals = carried_out(wanted, range(ranks), max_read_bytes=2**20)
    assert all(counts.eq(1).all() for counts in arrivals.values())
    assert requested == stored.nbytes
