"""What ranks write of a checkpoint: every byte once, whatever the layout, and no byte that is not theirs."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from shardwise.checkpoint.safetensors_layout import laid_out
from shardwise.conversion import whole
from shardwise.materialization.placing import elements_in, place_in
from shardwise.plan import Layout, StoredPiece, WantedTensor, dealt, plan_writes, unwritten
from shardwise.plan.write_plan import FEW_RUNS, run_numel, runs_of

LAYOUTS = {
    "rows": Layout(mesh_shape=(4,), mesh_ranks=(0, 1, 2, 3), placements=(Shard(0),)),
    "columns": Layout(mesh_shape=(4,), mesh_ranks=(0, 1, 2, 3), placements=(Shard(1),)),
    "whole on every rank": Layout.replicated((0, 1, 2, 3)),
    "copies of rows": Layout(mesh_shape=(2, 2), mesh_ranks=(0, 1, 2, 3), placements=(Replicate(), Shard(0))),
    "rows of rows": Layout(
        mesh_shape=(2, 2), mesh_ranks=(0, 1, 2, 3), placements=(_StridedShard(0, split_factor=2), Shard(0))
    ),
    "rows and columns": Layout(mesh_shape=(2, 2), mesh_ranks=(0, 1, 2, 3), placements=(Shard(0), Shard(1))),
    "one rank alone": Layout(mesh_shape=(1,), mesh_ranks=(2,), placements=(Shard(0),)),
}
SHAPES = {"a": (7, 10), "b": (3, 5), "c": (8, 1), "empty": (0, 4)}
RANKS = (0, 1, 2, 3)


def values(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(1, 1 + math.prod(shape), dtype=torch.float32).view(shape)


def shard_of(layout: Layout, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    shape = layout.local_shape(tuple(tensor.shape), rank)
    shard = torch.full(shape or (0,), torch.nan)
    for part in layout.parts(tuple(tensor.shape), rank):
        shard[part.local.slices()] = tensor[part.region.slices()]
    return shard


def wanted_in(layout: Layout) -> tuple[list[WantedTensor], int]:
    """Return tensors that one file wants as they are, and the file's size."""
    _, stored = laid_out({n: (s, torch.float32) for n, s in SHAPES.items()}, file="f", metadata={})
    wanted = [
        WantedTensor(
            fqn=name,
            shape=of.shape,
            dtype=of.dtype,
            layout=layout,
            pieces=(StoredPiece(stored=of, piece=whole(of.shape)),) if of.nbytes else (),
            may_map=False,
        )
        for name, of in stored.items()
    ]
    return wanted, max(of.stop for of in stored.values())


def written(
    wanted: list[WantedTensor],
    nbytes: int,
    *,
    writers: tuple[int, ...],
    shards: dict[int, dict[str, torch.Tensor]],
) -> tuple[torch.Tensor, Counter[int]]:
    """Carry out every rank's plan on one file in memory; return it, and how many bytes each rank wrote."""
    content, times = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.int)
    counts: Counter[int] = Counter()
    for rank in RANKS:
        plan = plan_writes(
            wanted, ranks=RANKS, rank=rank, writers=writers, max_write_bytes=64, buffer_bytes=64
        )
        counts[rank] = plan.written_bytes
        for write in plan.writes:
            assert sum(fragment.needed_bytes for fragment in write.fragments) == write.nbytes <= 64
            times[write.start : write.stop] += 1
            for fragment in write.fragments:
                elements = elements_in(content, fragment.start, torch.float32, fragment.piece)
                elements.copy_(place_in(shards[rank][fragment.fqn], fragment.piece))
        for turn in plan.exchange.rounds():
            if turn.read is None:
                continue
            times[turn.read.start : turn.read.stop] += 1
            of_slice = content[turn.read.start : turn.read.stop]
            messages = list(turn.outgoing)
            messages[RANKS.index(rank)] = turn.kept
            for owner, message in zip(RANKS, messages, strict=True):
                for each in message:
                    elements = elements_in(of_slice, each.slice_offset, each.dtype, each.piece)
                    elements.copy_(place_in(shards[owner][each.fqn], each.piece))
    first = min(each.stored.start for tensor in wanted for each in tensor.pieces)
    assert (times[first:] == 1).all()
    assert not times[:first].any()
    return content, counts


@pytest.mark.parametrize("writers", [RANKS, (0,), (0, 3)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_byte_is_written_once(name: str, writers: tuple[int, ...]) -> None:
    layout = LAYOUTS[name]
    wanted, nbytes = wanted_in(layout)
    shards = {
        rank: {tensor.fqn: shard_of(layout, values(tensor.shape), rank) for tensor in wanted}
        for rank in RANKS
    }
    content, counts = written(
        dealt(wanted, ranks=RANKS, writers=writers), nbytes, writers=writers, shards=shards
    )
    for tensor in wanted:
        for each in tensor.pieces:
            got = content[each.stored.start : each.stored.stop].view(torch.float32).view(each.stored.shape)
            assert torch.equal(got, values(tensor.shape)), tensor.fqn
    assert sum(counts.values()) == 4 * sum(math.prod(shape) for shape in SHAPES.values())
    assert {rank for rank, count in counts.items() if count} <= set(writers)


def test_copies_share_the_work_and_each_element_has_one_writer() -> None:
    wanted = wanted_in(LAYOUTS["whole on every rank"])[0]
    layouts = [tensor.layout.mesh_ranks for tensor in dealt(wanted, ranks=RANKS, writers=RANKS)]
    assert all(len(ranks) == 1 for ranks in layouts)
    assert len(set(layouts)) >= 3


def test_copies_of_ranks_that_see_the_directory_go_first() -> None:
    wanted = wanted_in(LAYOUTS["copies of rows"])[0]
    for tensor in dealt(wanted, ranks=RANKS, writers=(2, 3)):
        assert tensor.layout.mesh_ranks == (2, 3)
    assert not plan_exchange_bytes(dealt(wanted, ranks=RANKS, writers=(2, 3)), writers=(2, 3), rank=0)


def plan_exchange_bytes(wanted: list[WantedTensor], *, writers: tuple[int, ...], rank: int) -> int:
    plan = plan_writes(wanted, ranks=RANKS, rank=rank, writers=writers, max_write_bytes=64, buffer_bytes=64)
    return sum(sum(turn.receive_bytes) for turn in plan.exchange.rounds())


def test_long_runs_are_written_by_their_own_rank_and_short_ones_are_sent() -> None:
    layout = LAYOUTS["columns"]
    rows, columns = 2 * FEW_RUNS, 4 * 2**14
    _, stored = laid_out(
        {"long": ((rows, columns), torch.float32), "short": ((rows, 16), torch.float32)},
        file="f",
        metadata={},
    )
    wanted = [
        WantedTensor(
            fqn=name,
            shape=of.shape,
            dtype=of.dtype,
            layout=layout,
            pieces=(StoredPiece(stored=of, piece=whole(of.shape)),),
            may_map=False,
        )
        for name, of in stored.items()
    ]
    plan = plan_writes(wanted, ranks=RANKS, rank=1, writers=RANKS, max_write_bytes=2**22, buffer_bytes=2**22)
    assert {fragment.fqn for write in plan.writes for fragment in write.fragments} == {"long"}
    assert len(plan.writes) == rows
    assert set(plan.exchange.arriving) == {"short"}


def test_runs_are_counted_and_cut_without_gaps() -> None:
    piece = next(iter(whole((6, 10)).cut_target(1, 2, 5)))
    assert run_numel(piece) == 3
    runs = list(runs_of(piece))
    assert [run.source_start for run in runs] == [2, 12, 22, 32, 42, 52]
    assert all(run.source_span == run.numel == 3 for run in runs)
    turned = whole((6, 10)).reversed((6, 10))
    assert run_numel(turned) == 60


def test_a_tensor_that_nobody_makes_whole_is_named() -> None:
    wanted = wanted_in(LAYOUTS["rows"])[0]
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    assert unwritten(wanted, sizes) == {}
    assert unwritten(wanted[1:], sizes) == {wanted[0].fqn: 0}
