"""What ranks read and exchange, carried out on plain bytes and compared with slices of the full tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from shardwise.checkpoint import StoredTensor
from shardwise.conversion import Piece
from shardwise.conversion.tracing import TracedTensor
from shardwise.errors import ConfigurationError
from shardwise.materialization.placing import place_in
from shardwise.plan import (
    Layout,
    StoredPiece,
    WantedTensor,
    as_stored,
    exchanged,
    plan_exchange,
    plan_reads,
    require_covered,
)
from shardwise.plan.chosen import SMALL_TENSORS
from shardwise.plan.load_plan import MAX_GAP_BYTES

DTYPES = (torch.uint8, torch.int16, torch.float32, torch.float64)


def placements_of(draw: st.DrawFn, shape: tuple[int, ...], axes: int) -> tuple[Placement, ...]:
    kinds: list[st.SearchStrategy[Placement]] = [st.just(Replicate())]
    if shape:
        dims = st.integers(0, len(shape) - 1)
        kinds += [dims.map(Shard), dims.map(lambda dim: _StridedShard(dim, split_factor=2))]
    return tuple(draw(st.one_of(kinds)) for _ in range(axes))


OPERATIONS: dict[str, Callable[[list[torch.Tensor]], torch.Tensor]] = {
    "as stored": lambda tensors: tensors[0],
    "stack": torch.stack,
    "stack inside": lambda tensors: torch.stack(tensors, dim=-1),
    "cat": torch.cat,
    "cat inside": lambda tensors: torch.cat(tensors, dim=-1),
    "stack and cat": lambda tensors: torch.cat([torch.stack(tensors), torch.stack(tensors[::-1])], dim=1),
    "transpose": lambda tensors: tensors[0].transpose(0, -1).contiguous(),
    "last chunk": lambda tensors: tensors[0].chunk(2, dim=-1)[-1].contiguous(),
    "flatten": lambda tensors: tensors[0].flatten(),
    "interleave": lambda tensors: torch.stack(tensors, dim=1).flatten(0, 1),
}


@dataclass(frozen=True)
class Case:
    content: bytes
    wanted: list[WantedTensor]
    full: dict[str, torch.Tensor]
    ranks: tuple[int, ...]


@st.composite
def checkpoints(draw: st.DrawFn, operations: Sequence[str] = tuple(OPERATIONS)) -> Case:
    """Draw a file's bytes, tensors made of those that follow each other in it, and the ranks that want them."""
    mesh_shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    ranks = tuple(range(math.prod(mesh_shape)))
    position = draw(st.integers(0, 9))  # nothing says that a header ends on an element's boundary
    sources: list[list[StoredTensor]] = []
    chosen = []
    for index in range(draw(st.integers(1, 5))):
        operation = draw(st.sampled_from(operations))
        dims = 0 if operation == "as stored" else 1
        shape = tuple(draw(st.lists(st.integers(0, 9), min_size=dims, max_size=3)))
        dtype = draw(st.sampled_from(DTYPES))
        count = 1 if operation == "as stored" else draw(st.integers(1, 3))
        of_tensor = []
        for number in range(count):
            nbytes = math.prod(shape) * dtype.itemsize
            of_tensor.append(
                StoredTensor(
                    name=f"t{index}.{number}",
                    shape=shape,
                    dtype=dtype,
                    file="f",
                    start=position,
                    stop=position + nbytes,
                )
            )
            position += nbytes
        sources.append(of_tensor)
        chosen.append(operation)
    random = torch.randint(0, 255, (position,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    content = bytes(random.tolist())
    wanted, full = [], {}
    for index, (operation, of_tensor) in enumerate(zip(chosen, sources, strict=True)):
        made = OPERATIONS[operation]([stored_values(content, stored) for stored in of_tensor])
        traced = OPERATIONS[operation](
            [TracedTensor.of_source(stored.name, stored.shape, stored.dtype) for stored in of_tensor]
        )
        by_name = {stored.name: stored for stored in of_tensor}
        assert isinstance(traced, TracedTensor)
        full[f"m.t{index}"] = made
        wanted.append(
            WantedTensor(
                fqn=f"m.t{index}",
                shape=tuple(made.shape),
                dtype=made.dtype,
                layout=Layout(
                    mesh_shape=mesh_shape,
                    mesh_ranks=ranks,
                    placements=placements_of(draw, tuple(made.shape), len(mesh_shape)),
                ),
                pieces=tuple(StoredPiece(stored=by_name[p.source], piece=p.piece) for p in traced.parts),
                partial=False,
                may_map=draw(st.booleans()),
            )
        )
    return Case(content, wanted, full, ranks)


def stored_values(content: bytes, stored: StoredTensor) -> torch.Tensor:
    if stored.nbytes == 0:
        return torch.empty(stored.shape, dtype=stored.dtype)
    data = torch.frombuffer(bytearray(content[stored.start : stored.stop]), dtype=stored.dtype)
    return data.view(stored.shape)


def expected_shard(case: Case, tensor: WantedTensor, rank: int) -> torch.Tensor:
    shard = empty_shard(tensor, rank)
    for part in tensor.layout.parts(tensor.shape, rank):
        shard[part.local.slices()] = case.full[tensor.fqn][part.region.slices()]
    return shard


def empty_shard(tensor: WantedTensor, rank: int) -> torch.Tensor:
    shape = tensor.layout.local_shape(tensor.shape, rank)
    assert shape is not None
    return torch.zeros(shape, dtype=tensor.dtype)


def elements(data: bytes, dtype: torch.dtype, piece: Piece) -> torch.Tensor:
    """A piece's elements, the first one at the start of some bytes."""
    flat = torch.frombuffer(bytearray(data[: piece.source_span * dtype.itemsize]), dtype=dtype)
    return flat.as_strided(piece.sizes, piece.source_strides)


def same_bytes(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return got.shape == expected.shape and got.numpy().tobytes() == expected.numpy().tobytes()


@given(case=checkpoints(), max_read_bytes=st.sampled_from([16, 24, 100, 10_000]), gap=st.integers(0, 40))
@settings(max_examples=200)
def test_reads_and_mapped_extents_fill_every_shard(case: Case, max_read_bytes: int, gap: int) -> None:
    content, wanted, ranks = case.content, case.wanted, case.ranks
    by_fqn = {tensor.fqn: tensor for tensor in wanted}
    for rank in ranks:
        plan = plan_reads(wanted, rank=rank, max_read_bytes=max_read_bytes, max_gap_bytes=gap)
        shards = {tensor.fqn: empty_shard(tensor, rank) for tensor in wanted}
        for mapped in plan.mapped:
            tensor = by_fqn[mapped.fqn]
            assert tensor.may_map
            assert all(run.start % tensor.dtype.itemsize == 0 for run in mapped.runs)
            data = bytearray(b"".join(content[run.start : run.stop] for run in mapped.runs))
            assert len(data) == mapped.nbytes
            shards[mapped.fqn] = torch.frombuffer(data, dtype=tensor.dtype).view(shards[mapped.fqn].shape)
        for read in plan.reads:
            assert read.nbytes <= max_read_bytes
            for fragment in read.fragments:
                data = content[fragment.start : fragment.stop]
                found = elements(data, fragment.stored.dtype, fragment.piece)
                place_in(shards[fragment.fqn], fragment.piece).copy_(found)
        for tensor in wanted:
            assert same_bytes(shards[tensor.fqn], expected_shard(case, tensor, rank))


@given(case=checkpoints(), page_bytes=st.sampled_from([1, 4]))
@settings(max_examples=200)
def test_stitched_runs_fill_a_shard_in_its_order(case: Case, page_bytes: int) -> None:
    """As above, with pages so small that shards of several runs are mapped too."""
    with patch.multiple("shardwise.plan.wanted", _PAGE_BYTES=page_bytes, _LEAST_STITCHED_BYTES=1):
        for tensor, rank in itertools.product(case.wanted, case.ranks):
            mapped = tensor.mapped_on(rank)
            event(f"runs: {len(mapped.runs) if mapped is not None else None}")
            if mapped is None:
                continue
            expected = expected_shard(case, tensor, rank)
            data = bytearray(b"".join(case.content[run.start : run.stop] for run in mapped.runs))
            assert same_bytes(torch.frombuffer(data, dtype=tensor.dtype).view(expected.shape), expected)
            places = itertools.accumulate((run.stop - run.start for run in mapped.runs), initial=0)
            shifts = {(run.start - at) % page_bytes for run, at in zip(mapped.runs, places, strict=False)}
            assert len(shifts) == 1


def test_experts_are_stitched_where_their_runs_are_long_and_fit() -> None:
    def stacked(*, rows: int, first: int, gap: int = 0, dtype: torch.dtype = torch.bfloat16) -> WantedTensor:
        nbytes = rows * 1024 * 2
        stored = [
            StoredTensor(
                name=f"e{number}",
                shape=(rows, 1024),
                dtype=torch.bfloat16,
                file="f",
                start=first + number * (nbytes + gap),
                stop=first + number * (nbytes + gap) + nbytes,
            )
            for number in range(8)
        ]
        traced = torch.stack([TracedTensor.of_source(s.name, s.shape, s.dtype) for s in stored])
        assert isinstance(traced, TracedTensor)
        by_name = {each.name: each for each in stored}
        return WantedTensor(
            fqn="experts",
            shape=(8, rows, 1024),
            dtype=dtype,
            layout=Layout(mesh_shape=(2,), mesh_ranks=(0, 1), placements=(Shard(0),)),
            pieces=tuple(StoredPiece(stored=by_name[p.source], piece=p.piece) for p in traced.parts),
            may_map=True,
        )

    apart = stacked(rows=64, first=200, gap=8192).mapped_on(1)  # other tensors lie between
    assert apart is not None
    assert [(run.start, run.stop - run.start) for run in apart.runs] == [
        (200 + number * (2**17 + 8192), 2**17) for number in range(4, 8)
    ]
    together = stacked(rows=64, first=200).mapped_on(0)
    assert together is not None
    assert [(run.start, run.stop) for run in together.runs] == [(200, 200 + 4 * 2**17)]
    assert stacked(rows=32, first=200, gap=8192).mapped_on(0) is None  # short runs
    assert stacked(rows=64, first=200, gap=64).mapped_on(0) is None  # pages that do not fit to each other
    assert stacked(rows=64, first=200, gap=8192, dtype=torch.float32).mapped_on(0) is None


def case_of_columns_over_three_ranks() -> Case:
    stored = StoredTensor(name="t0", shape=(8, 8), dtype=torch.uint8, file="f", start=0, stop=64)
    content = bytes(range(64))
    tensor = WantedTensor(
        fqn="m.t0",
        shape=(8, 8),
        dtype=torch.uint8,
        layout=Layout(mesh_shape=(3,), mesh_ranks=(0, 1, 2), placements=(Shard(1),)),
        pieces=as_stored(stored),
        partial=False,
        may_map=False,
    )
    return Case(content, [tensor], {"m.t0": stored_values(content, stored)}, (0, 1, 2))


@given(case=checkpoints(), buffer_bytes=st.sampled_from([48, 100, 10_000]), alone=st.booleans())
@example(case=case_of_columns_over_three_ranks(), buffer_bytes=48, alone=False)
@settings(max_examples=200)
def test_exchanged_pieces_fill_every_shard(case: Case, buffer_bytes: int, alone: bool) -> None:
    content, wanted, ranks = case.content, case.wanted, case.ranks
    chosen = frozenset(range(len(wanted)))
    shards = {rank: {tensor.fqn: empty_shard(tensor, rank) for tensor in wanted} for rank in ranks}
    last = len(ranks) - 1
    plans = {
        rank: plan_exchange(
            wanted,
            chosen,
            ranks=ranks,
            rank=rank,
            buffer_bytes=buffer_bytes,
            readers=ranks[-1:] if alone else ranks,
        )
        for rank in ranks
    }
    rounds = {rank: list(plan.rounds()) for rank, plan in plans.items()}
    for rank, plan in plans.items():
        assert len(plan) == len(rounds[rank])
        assert plan.network_bytes == sum(sum(turn.receive_bytes) for turn in rounds[rank])
        assert plan.storage_bytes == sum(turn.read.nbytes for turn in rounds[rank] if turn.read is not None)
        require_covered(wanted, [plan.arriving], rank=rank, name="the case")
    assert len({len(of_rank) for of_rank in rounds.values()}) == 1
    requested: list[tuple[int, int]] = []
    for number in range(len(rounds[0])):
        messages: dict[tuple[int, int], bytearray] = {}
        for sender in ranks:
            turn = rounds[sender][number]
            assert turn.read is None or sender == last or not alone
            data = content[turn.read.start : turn.read.stop] if turn.read is not None else b""
            requested += [(turn.read.start, turn.read.stop)] if turn.read is not None else []
            for transfer in turn.kept:
                found = elements(data[transfer.slice_offset :], transfer.dtype, transfer.piece)
                place_in(shards[sender][transfer.fqn], transfer.piece).copy_(found)
            for receiver, (sent, length) in enumerate(zip(turn.outgoing, turn.send_bytes, strict=True)):
                message = messages[sender, receiver] = bytearray(length)
                for transfer in sent:
                    found = elements(data[transfer.slice_offset :], transfer.dtype, transfer.piece)
                    as_bytes = found.contiguous().numpy().tobytes()
                    message[transfer.message_offset : transfer.message_offset + len(as_bytes)] = as_bytes
        for receiver in ranks:
            turn = rounds[receiver][number]
            for sender, (arriving, length) in enumerate(zip(turn.incoming, turn.receive_bytes, strict=True)):
                message = messages[sender, receiver]
                assert len(message) == length
                for transfer in arriving:
                    packed = message[transfer.message_offset : transfer.message_offset + transfer.nbytes]
                    values = torch.frombuffer(packed, dtype=transfer.dtype).view(transfer.piece.sizes)
                    place_in(shards[receiver][transfer.fqn], transfer.piece).copy_(values)
    requested.sort()
    assert all(before[1] <= after[0] for before, after in pairwise(requested)), "a byte is read twice"
    for rank in ranks:
        for tensor in wanted:
            assert same_bytes(shards[rank][tensor.fqn], expected_shard(case, tensor, rank))


def wanted_tensors(
    count: int, shape: tuple[int, ...], placement: Placement, *, ranks: int, may_map: bool = False
) -> list[WantedTensor]:
    nbytes = math.prod(shape) * 2
    layout = Layout(mesh_shape=(ranks,), mesh_ranks=tuple(range(ranks)), placements=(placement,))
    return [
        WantedTensor(
            fqn=f"t{i}",
            shape=shape,
            dtype=torch.bfloat16,
            layout=layout,
            pieces=as_stored(
                StoredTensor(
                    name=f"t{i}",
                    shape=shape,
                    dtype=torch.bfloat16,
                    file="f",
                    start=i * nbytes,
                    stop=(i + 1) * nbytes,
                )
            ),
            partial=False,
            may_map=may_map,
        )
        for i in range(count)
    ]


def test_whole_job_requests_each_byte_of_row_shards_once() -> None:
    wanted = wanted_tensors(3, (1021, 512), Shard(0), ranks=4)
    assert exchanged(wanted, ranks=range(4)) == frozenset()
    plans = [plan_reads(wanted, rank=rank, max_read_bytes=2**16) for rank in range(4)]
    assert sum(plan.storage_bytes for plan in plans) == sum(
        tensor.pieces[0].stored.nbytes for tensor in wanted
    )


def test_column_shards_are_exchanged_and_not_read_by_every_rank() -> None:
    wanted = wanted_tensors(1, (64, 64), Shard(1), ranks=4)
    assert exchanged(wanted, ranks=range(4)) == {0}
    alone = plan_reads(wanted, rank=0, max_read_bytes=2**20)
    assert alone.storage_bytes > 0.95 * wanted[0].pieces[0].stored.nbytes  # what each rank would have read


def test_many_small_tensors_become_few_reads() -> None:
    wanted = wanted_tensors(20_000, (128, 8), Shard(0), ranks=2)
    chosen = exchanged(wanted, ranks=range(2))
    assert len(chosen) == 20_000
    plan = plan_exchange(wanted, chosen, ranks=range(2), rank=0, buffer_bytes=8 * 2**20, readers=range(2))
    assert len(plan) <= 10


def test_small_tensors_that_are_mapped_need_no_exchange() -> None:
    wanted = wanted_tensors(1000, (128, 8), Shard(0), ranks=2, may_map=True)
    assert exchanged(wanted, ranks=range(2)) == frozenset()


def test_small_tensors_that_only_some_ranks_can_map_are_exchanged() -> None:
    wanted = wanted_tensors(
        1000, (127, 8), Shard(0), ranks=2, may_map=True
    )  # the last shard is short: padded
    assert len(exchanged(wanted, ranks=range(2))) == 1000


def test_a_few_small_tensors_between_large_ones_are_read_by_their_owners() -> None:
    wanted = wanted_tensors(SMALL_TENSORS - 1, (128, 8), Shard(0), ranks=2)
    assert exchanged(wanted, ranks=range(2)) == frozenset()


def test_a_gap_is_read_along_where_it_is_small_against_what_is_wanted() -> None:
    fits, too_much = wanted_around_a_gap(rows=25), wanted_around_a_gap(rows=24)
    assert [read.nbytes for read in plan_reads(fits, rank=0, max_read_bytes=2**20).reads] == [51 * 4096]
    apart = plan_reads(fits, rank=0, max_read_bytes=2**20, max_gap_bytes=4095)
    assert [read.nbytes for read in apart.reads] == [25 * 4096] * 2
    assert [read.nbytes for read in plan_reads(too_much, rank=0, max_read_bytes=2**20).reads] == [
        24 * 4096
    ] * 2


def wanted_around_a_gap(*, rows: int) -> list[WantedTensor]:
    """Two tensors of some pages, and one page between them that belongs to nobody."""
    assert MAX_GAP_BYTES == 4096
    first, second = wanted_tensors(2, (rows, 2048), Shard(0), ranks=1)
    (piece,) = second.pieces
    moved = replace(piece.stored, start=piece.stored.start + 4096, stop=piece.stored.stop + 4096)
    return [first, replace(second, pieces=(replace(piece, stored=moved),))]


def test_a_short_shard_is_copied_because_it_needs_padding() -> None:
    wanted = wanted_tensors(1, (5, 4), Shard(0), ranks=2, may_map=True)
    assert len(plan_reads(wanted, rank=0, max_read_bytes=2**20).mapped) == 1
    last = plan_reads(wanted, rank=1, max_read_bytes=2**20)
    assert (len(last.mapped), len(last.reads)) == (0, 1)


def test_a_read_holds_at_least_one_element() -> None:
    with pytest.raises(ConfigurationError, match="expected max_read_bytes of at least 16, got 8"):
        plan_reads([], rank=0, max_read_bytes=8)
