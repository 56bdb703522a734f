"""The rank0 route as data: pieces, slots, buckets and their bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from shardwise.errors import ConfigurationError
from shardwise.plan import Layout, Piece, PlannedTensor, ScatterPlan, plan_scatter
from shardwise.plan.scatter_plan import ALIGNMENT_BYTES, split_region
from shardwise.tensors import Region, TensorSpec

dtypes = st.sampled_from([torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.complex128])


def planned(fqn: str, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout) -> PlannedTensor:
    return PlannedTensor(spec=TensorSpec(fqn=fqn, shape=shape, dtype=dtype), layout=layout)


@st.composite
def plans(draw: st.DrawFn) -> tuple[ScatterPlan, int]:
    """Draw a plan, and the staging size that it was made for."""
    size = draw(st.integers(1, 5))
    mesh_shape = (2, size // 2) if size % 2 == 0 and draw(st.booleans()) else (size,)
    ranks = tuple(range(size))
    tensors = []
    for index in range(draw(st.integers(0, 5))):
        shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
        options = [st.just(Replicate())] + [st.just(Shard(dim)) for dim in range(len(shape))]
        placements = tuple(draw(st.one_of(options)) for _ in mesh_shape)
        layout = Layout(mesh_shape=mesh_shape, mesh_ranks=ranks, placements=placements)
        tensors.append(planned(f"t{index}", shape, draw(dtypes), layout))
    staging_bytes = draw(st.integers(2 * size * ALIGNMENT_BYTES, 2000))
    source_rank = draw(st.sampled_from(ranks))
    plan = plan_scatter(tensors, ranks=ranks, source_rank=source_rank, staging_bytes=staging_bytes)
    return plan, staging_bytes


def pieces_of(plan: ScatterPlan, rank: int) -> Iterator[Piece]:
    position = plan.ranks.index(rank)
    for bucket in plan.buckets:
        yield from bucket.slots[position]


def nbytes(plan: ScatterPlan, piece: Piece) -> int:
    return piece.region.numel * plan.tensors[piece.tensor].spec.dtype.itemsize


@given(case=plans())
def test_pieces_cover_each_ranks_region_exactly_once(case: tuple[ScatterPlan, int]) -> None:
    plan, _ = case
    for rank in plan.ranks:
        counts = [torch.zeros(tensor.spec.shape, dtype=torch.int64) for tensor in plan.tensors]
        for piece in pieces_of(plan, rank):
            counts[piece.tensor][piece.region.slices()] += 1
        for tensor, count in zip(plan.tensors, counts, strict=True):
            expected = torch.zeros_like(count)
            region = tensor.layout.region(tensor.spec.shape, rank)
            if rank != plan.source_rank and region is not None:
                expected[region.slices()] = 1
            assert torch.equal(count, expected)


@given(case=plans())
def test_slots_hold_their_pieces_apart_and_aligned(case: tuple[ScatterPlan, int]) -> None:
    plan, _ = case
    for bucket in plan.buckets:
        assert len(bucket.slots) == len(plan.ranks)
        for slot in bucket.slots:
            end = 0
            for piece in slot:
                assert piece.offset_bytes % ALIGNMENT_BYTES == 0
                assert piece.offset_bytes >= end
                assert nbytes(plan, piece) > 0
                end = piece.offset_bytes + nbytes(plan, piece)
            assert end <= plan.slot_bytes


@given(case=plans())
def test_two_buckets_in_flight_fit_into_the_staging_size(case: tuple[ScatterPlan, int]) -> None:
    plan, staging_bytes = case
    assert 2 * len(plan.ranks) * plan.slot_bytes <= staging_bytes
    assert (plan.slot_bytes == 0) == (len(plan.buckets) == 0)


@given(case=plans())
def test_payloads_are_the_sum_of_regions_and_nothing_goes_to_the_source(
    case: tuple[ScatterPlan, int],
) -> None:
    plan, _ = case
    for rank, payload in zip(plan.ranks, plan.bytes_to_rank, strict=True):
        regions = [(t.layout.region(t.spec.shape, rank), t.spec.dtype.itemsize) for t in plan.tensors]
        expected = sum(region.numel * itemsize for region, itemsize in regions if region is not None)
        assert payload == (0 if rank == plan.source_rank else expected)
    assert list(pieces_of(plan, plan.source_rank)) == []
    assert plan.network_bytes == sum(plan.bytes_to_rank)


@given(case=plans())
def test_equal_arguments_make_an_equal_plan(case: tuple[ScatterPlan, int]) -> None:
    plan, staging_bytes = case
    again = plan_scatter(
        plan.tensors, ranks=plan.ranks, source_rank=plan.source_rank, staging_bytes=staging_bytes
    )
    assert again == plan


@given(case=plans())
def test_tensors_travel_in_their_order_and_the_last_bucket_is_known(case: tuple[ScatterPlan, int]) -> None:
    plan, _ = case
    last: dict[int, int] = {}
    for rank in plan.ranks:
        order = [piece.tensor for piece in pieces_of(plan, rank)]
        assert order == sorted(order)
    for index, bucket in enumerate(plan.buckets):
        assert any(bucket.slots)  # no collective moves nothing
        for slot in bucket.slots:
            last.update((piece.tensor, index) for piece in slot)
    assert plan.last_bucket_of_tensor == last


def test_small_tensors_share_a_bucket() -> None:
    layout = Layout.replicated([0, 1])
    tensors = [planned(f"t{i}", (3,), torch.float32, layout) for i in range(4)]  # 12 bytes, 16 in a slot
    plan = plan_scatter(tensors, ranks=[0, 1], source_rank=0, staging_bytes=2 * 2 * 64)
    assert len(plan.buckets) == 1
    assert [piece.offset_bytes for piece in plan.buckets[0].slots[1]] == [0, 16, 32, 48]
    assert plan.slot_bytes == 64
    assert plan.bytes_to_rank == (0, 48)


def test_a_large_tensor_is_cut_along_its_rows() -> None:
    plan = plan_scatter(
        [planned("weight", (10, 4), torch.float32, Layout.replicated([0, 1]))],
        ranks=[0, 1],
        source_rank=1,
        staging_bytes=2 * 2 * 48,
    )
    cuts = [(piece.region.start[0], piece.region.stop[0]) for piece in pieces_of(plan, 0)]
    assert cuts == [(0, 3), (3, 6), (6, 9), (9, 10)]


def test_one_rank_needs_no_bucket() -> None:
    plan = plan_scatter(
        [planned("weight", (8,), torch.float32, Layout.replicated([0]))],
        ranks=[0],
        source_rank=0,
        staging_bytes=1024,
    )
    assert (plan.buckets, plan.slot_bytes, plan.network_bytes) == ((), 0, 0)


@st.composite
def regions(draw: st.DrawFn) -> Region:
    start = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    return Region(start=start, stop=tuple(low + draw(st.integers(0, 6)) for low in start))


@given(region=regions(), max_numel=st.integers(1, 40))
@example(region=Region(start=(0, 0, 0), stop=(1, 1, 7)), max_numel=3)
def test_split_region_partitions_it_into_small_parts(region: Region, max_numel: int) -> None:
    parts = list(split_region(region, max_numel=max_numel))
    counts = torch.zeros(region.stop, dtype=torch.int64)
    for part in parts:
        assert part.numel <= max_numel
        counts[part.slices()] += 1
    expected = torch.zeros_like(counts)
    expected[region.slices()] = 1
    assert torch.equal(counts, expected)


@given(region=regions(), max_numel=st.integers(1, 40))
def test_parts_of_a_region_are_contiguous_and_in_order(region: Region, max_numel: int) -> None:
    numbers = torch.arange(math.prod(region.stop)).reshape(region.stop)[region.slices()].flatten().tolist()
    parts = split_region(region, max_numel=max_numel)
    full = torch.arange(math.prod(region.stop)).reshape(region.stop)
    assert [n for part in parts for n in full[part.slices()].flatten().tolist()] == numbers


def test_whole_rows_stay_together_where_they_fit() -> None:
    parts = split_region(Region(start=(2, 0), stop=(7, 10)), max_numel=25)
    assert [(part.start, part.stop) for part in parts] == [
        ((2, 0), (4, 10)),
        ((4, 0), (6, 10)),
        ((6, 0), (7, 10)),
    ]


def test_a_staging_size_without_room_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(ConfigurationError) as caught:
        plan_scatter([], ranks=[0, 1, 2, 3], source_rank=0, staging_bytes=127)
    assert str(caught.value) == "staging_bytes: expected at least 128 for 4 ranks, got 127"
    plan_scatter([], ranks=[0, 1, 2, 3], source_rank=0, staging_bytes=128)


def test_the_source_must_be_one_of_the_ranks() -> None:
    with pytest.raises(ConfigurationError) as caught:
        plan_scatter([], ranks=[1, 2], source_rank=0, staging_bytes=1024)
    assert str(caught.value) == "scatter plan: source rank 0 is not one of the ranks (1, 2)"
