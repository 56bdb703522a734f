"""How an exchange is cut: no buffer overflows in any round, and every rank reads long runs of bytes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from shardwise.checkpoint import StoredTensor
from shardwise.conversion import whole
from shardwise.plan import Layout, Slices, StoredPiece, WantedTensor, as_stored, plan_exchange, slices_of
from shardwise.plan.boxes import ALIGNMENT_BYTES

MEBIBYTE = 2**20


def layout_of(*axes: tuple[int, Placement]) -> Layout:
    shape = tuple(size for size, _ in axes)
    return Layout(
        mesh_shape=shape,
        mesh_ranks=tuple(range(math.prod(shape))),
        placements=tuple(placement for _, placement in axes),
    )


def stored_one_after_the_other(shapes: list[tuple[int, ...]], *, gap: int = 0) -> list[StoredTensor]:
    found, start = [], 0
    for number, shape in enumerate(shapes):
        stop = start + math.prod(shape) * 2
        found.append(
            StoredTensor(
                name=f"w{number}", shape=shape, dtype=torch.bfloat16, file="f", start=start, stop=stop
            )
        )
        start = stop + gap
    return found


def wanted_of(layout: Layout, shapes: list[tuple[int, ...]], *, gap: int = 0) -> list[WantedTensor]:
    return [
        WantedTensor(
            fqn=stored.name,
            shape=stored.shape,
            dtype=torch.bfloat16,
            layout=layout,
            pieces=as_stored(stored),
            may_map=False,
        )
        for stored in stored_one_after_the_other(shapes, gap=gap)
    ]


def stacked(layout: Layout, experts: int, shape: tuple[int, int]) -> WantedTensor:
    """A tensor of the model whose rows on dim 0 are stored tensors of their own."""
    pieces = []
    for number, stored in enumerate(stored_one_after_the_other([shape] * experts)):
        of_one = whole((1, *shape)).moved((number, 0, 0))
        pieces.append(StoredPiece(stored=stored, piece=of_one))
    return WantedTensor(
        fqn="experts",
        shape=(experts, *shape),
        dtype=torch.bfloat16,
        layout=layout,
        pieces=tuple(pieces),
        may_map=False,
    )


def cut(wanted: list[WantedTensor], *, ranks: int, buffer_bytes: int) -> Slices:
    everyone = range(ranks)
    return slices_of(
        wanted,
        frozenset(range(len(wanted))),
        ranks=everyone,
        buffer_bytes=buffer_bytes,
        readers=everyone,
        reader_of=None,
    )


LAYOUTS = [
    layout_of((4, Shard(0))),
    layout_of((6, Shard(0))),
    layout_of((2, Replicate()), (3, Shard(0))),
    layout_of((4, Shard(1))),
    layout_of((2, Shard(0)), (2, Shard(1))),
    layout_of((2, Replicate()), (2, Shard(1))),
    layout_of(
        (3, Replicate()),
    ),
]


@given(
    layout=st.sampled_from(LAYOUTS),
    more=st.sampled_from(LAYOUTS),
    shapes=st.lists(st.tuples(st.integers(1, 100), st.integers(1, 40)), min_size=1, max_size=3),
    buffer_bytes=st.integers(256, 1000),
    alone=st.booleans(),
    gap=st.sampled_from([0, 10]),
)
@settings(max_examples=50)
def test_no_rank_reads_sends_or_receives_more_than_a_buffer_in_a_round(
    layout: Layout,
    more: Layout,
    shapes: list[tuple[int, int]],
    buffer_bytes: int,
    alone: bool,
    gap: int,
) -> None:
    wanted = wanted_of(layout, shapes, gap=gap)
    # A second tensor that takes every other stored one, as a tied weight does that is kept on another mesh.
    wanted += [
        WantedTensor(
            fqn=f"more.{tensor.fqn}",
            shape=tensor.shape,
            dtype=tensor.dtype,
            layout=more,
            pieces=tensor.pieces,
            may_map=False,
        )
        for tensor in wanted[::2]
    ]
    ranks = range(max(len(layout.mesh_ranks), len(more.mesh_ranks)))
    for rank in ranks:
        plan = plan_exchange(
            wanted,
            frozenset(range(len(wanted))),
            ranks=ranks,
            rank=rank,
            buffer_bytes=buffer_bytes,
            readers=ranks[-1:] if alone else ranks,
        )
        of_rank = list(plan.rounds())
        reads = [turn.read for turn in of_rank if turn.read is not None]
        if plan.rounds_in_flight > 1:  # in the room of what arrives
            assert not any(sum(turn.receive_bytes) for turn in of_rank)
        extents = list(plan.extents())
        assert sum(extent.slices for extent in extents) == len(reads)
        assert sum(extent.nbytes for extent in extents) == plan.storage_bytes
        assert all(extent.nbytes < buffer_bytes + ALIGNMENT_BYTES for extent in extents)
        for turn in of_rank:
            sent = sum(t.nbytes for message in turn.outgoing for t in message)
            received = [t.nbytes for message in turn.incoming for t in message]
            assert turn.read is None or turn.read.nbytes < buffer_bytes + ALIGNMENT_BYTES
            assert sent < buffer_bytes + 8 * ALIGNMENT_BYTES  # one element too many, times its copies
            assert sum(received) <= buffer_bytes + ALIGNMENT_BYTES * len(received)


@pytest.mark.parametrize(
    "ranks", [128, 256, 384]
)  # of 32 layers, so that ranks read the same places of several
def test_every_rank_reads_long_extents_and_hands_them_out_at_once(ranks: int) -> None:
    buffer_bytes = 12 * MEBIBYTE
    layout = layout_of((ranks, Shard(0)))
    # 13 GiB: the shapes of a model of 8 B parameters, of which a rank owns a few hundred KiB each.
    layer = [
        (4096, 4096),
        (1024, 4096),
        (1024, 4096),
        (4096, 4096),
        (14336, 4096),
        (14336, 4096),
        (4096, 14336),
    ]
    wanted = wanted_of(layout, layer * 32)
    slices = cut(wanted, ranks=ranks, buffer_bytes=buffer_bytes)
    for reader in (0, 17, ranks - 1):
        extents = list(slices.extents(reader))
        assert all(8 * MEBIBYTE <= extent.nbytes <= buffer_bytes for extent in extents)
    share = sum(tensor.pieces[0].stored.nbytes for tensor in wanted) / ranks
    assert slices.bytes_of_reader.max() <= 1.01 * share
    # In the worst case all that is read in a round were one rank's, and a slice had 96 KiB or less.
    assert (slices.stop - slices.start).mean() >= buffer_bytes / 3


def test_slices_are_small_where_few_ranks_own_all_that_is_read() -> None:
    ranks, buffer_bytes = 64, MEBIBYTE
    layout = layout_of((ranks, Shard(0)))
    wanted = [
        stacked(layout, 4, (1024, 4096))
    ]  # 8 MiB on each of the first four ranks, nothing on the others
    slices = cut(wanted, ranks=ranks, buffer_bytes=buffer_bytes)
    assert slices.rounds >= 8
    received = [0] * slices.rounds
    plan = plan_exchange(
        wanted, frozenset({0}), ranks=range(ranks), rank=0, buffer_bytes=buffer_bytes, readers=range(ranks)
    )
    received = [sum(turn.receive_bytes) for turn in plan.rounds()]
    assert max(received) <= buffer_bytes
    assert sum(received) == plan.network_bytes
    # Each rank reads its part at once all the same.
    assert [extent.slices for extent in slices.extents(5)] == [slices.rounds]


@pytest.mark.parametrize(("gap", "slices"), [(0, 1), (2, 3)])
def test_tensors_that_follow_each_other_are_one_slice(gap: int, slices: int) -> None:
    wanted = wanted_of(layout_of((2, Shard(0))), [(8, 8)] * 3, gap=gap)
    assert len(cut(wanted, ranks=2, buffer_bytes=2**16)) == slices


def test_nothing_to_exchange() -> None:
    slices = cut([], ranks=2, buffer_bytes=2**16)
    assert (len(slices), slices.rounds, slices.bytes_of_reader.tolist()) == (0, 0, [0, 0])


def test_each_replica_gets_what_the_others_read() -> None:
    ranks, buffer_bytes = 4, 3000
    wanted = wanted_of(layout_of((ranks, Replicate())), [(100, 100)])
    plans = [
        plan_exchange(
            wanted,
            frozenset({0}),
            ranks=range(ranks),
            rank=rank,
            buffer_bytes=buffer_bytes,
            readers=range(ranks),
        )
        for rank in range(ranks)
    ]
    received = [sum(turn.receive_bytes) for plan in plans for turn in plan.rounds()]
    assert 0.8 * buffer_bytes < max(received) <= buffer_bytes
    sent = [sum(turn.send_bytes) for plan in plans for turn in plan.rounds()]
    assert 0.8 * buffer_bytes < max(sent) <= buffer_bytes
