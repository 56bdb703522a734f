"""The rank0 route as data: pieces, slots, buckets and their bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from shardwise.errors import ConfigurationError
from shardwise.plan import (
    BUCKETS_IN_FLIGHT,
    Bucket,
    DirectBucket,
    Layout,
    Piece,
    PlannedTensor,
    ScatterPlan,
    plan_scatter,
)
from shardwise.plan.boxes import ALIGNMENT_BYTES
from shardwise.tensors import Region, TensorSpec

dtypes = st.sampled_from([torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.complex128])


def planned(fqn: str, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout) -> PlannedTensor:
    return PlannedTensor(spec=TensorSpec(fqn=fqn, shape=shape, dtype=dtype), layout=layout)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A plan and the limits that it was made for."""

    plan: ScatterPlan
    staging_bytes: int
    direct_from_bytes: int | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
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
    direct_from_bytes = draw(st.one_of(st.none(), st.integers(1, 300)))
    plan = plan_scatter(
        tensors,
        ranks=ranks,
        source_rank=source_rank,
        staging_bytes=staging_bytes,
        direct_from_bytes=direct_from_bytes,
    )
    return Case(plan=plan, staging_bytes=staging_bytes, direct_from_bytes=direct_from_bytes)


def packed(plan: ScatterPlan) -> list[Bucket]:
    return [bucket for bucket in plan.buckets if isinstance(bucket, Bucket)]


def direct(plan: ScatterPlan) -> list[DirectBucket]:
    return [bucket for bucket in plan.buckets if isinstance(bucket, DirectBucket)]


def pieces_of(plan: ScatterPlan, rank: int) -> Iterator[Piece]:
    position = plan.ranks.index(rank)
    for bucket in packed(plan):
        yield from bucket.slots[position]


def regions_of(plan: ScatterPlan, rank: int) -> Iterator[tuple[int, Region]]:
    """Yield the index of a tensor and a region of it for everything that reaches a rank."""
    position = plan.ranks.index(rank)
    for bucket in direct(plan):
        yield bucket.tensor, bucket.regions[position]
    for piece in pieces_of(plan, rank):
        yield piece.tensor, piece.region


def nbytes(plan: ScatterPlan, tensor: int, region: Region) -> int:
    return region.numel * plan.tensors[tensor].spec.dtype.itemsize


@given(case=cases())
def test_each_ranks_region_is_covered_exactly_once(case: Case) -> None:
    plan = case.plan
    straight = {bucket.tensor for bucket in direct(plan)}
    for rank in plan.ranks:
        counts = [torch.zeros(tensor.spec.shape, dtype=torch.int64) for tensor in plan.tensors]
        for index, part in regions_of(plan, rank):
            counts[index][part.slices()] += 1
        for index, (tensor, count) in enumerate(zip(plan.tensors, counts, strict=True)):
            expected = torch.zeros_like(count)
            region = tensor.layout.region(tensor.spec.shape, rank)
            # The source's own part takes part in a direct bucket, and is not packed.
            if region is not None and (rank != plan.source_rank or index in straight):
                expected[region.slices()] = 1
            assert torch.equal(count, expected)


@given(case=cases())
def test_slots_hold_their_pieces_apart_and_aligned(case: Case) -> None:
    plan = case.plan
    for bucket in packed(plan):
        assert len(bucket.slots) == len(plan.ranks)
        for slot in bucket.slots:
            end = 0
            for piece in slot:
                assert piece.offset_bytes % ALIGNMENT_BYTES == 0
                assert piece.offset_bytes >= end
                assert nbytes(plan, piece.tensor, piece.region) > 0
                end = piece.offset_bytes + nbytes(plan, piece.tensor, piece.region)
            assert end <= plan.slot_bytes


@given(case=cases())
def test_the_buckets_in_flight_fit_into_the_staging_size(case: Case) -> None:
    plan = case.plan
    assert BUCKETS_IN_FLIGHT * len(plan.ranks) * plan.slot_bytes <= case.staging_bytes
    assert (plan.slot_bytes == 0) == (len(packed(plan)) == 0)
    for bucket in direct(plan):
        moved = sum(nbytes(plan, bucket.tensor, region) for region in bucket.regions)
        assert BUCKETS_IN_FLIGHT * moved <= case.staging_bytes


@given(case=cases())
def test_direct_buckets_carry_equal_contiguous_parts_of_large_regions(case: Case) -> None:
    plan = case.plan
    for bucket in direct(plan):
        tensor = plan.tensors[bucket.tensor]
        full = torch.empty(tensor.spec.shape, device="meta")
        assert len(bucket.regions) == len(plan.ranks)
        assert len({region.shape for region in bucket.regions}) == 1
        for rank, part in zip(plan.ranks, bucket.regions, strict=True):
            own = tensor.layout.region(tensor.spec.shape, rank)
            assert own is not None
            assert nbytes(plan, bucket.tensor, own) >= (case.direct_from_bytes or math.inf)
            assert full[part.slices()].is_contiguous()
            assert full[own.slices()][part.relative_to(own).slices()].is_contiguous()


@given(case=cases())
def test_payloads_are_the_sum_of_regions_and_none_is_counted_for_the_source(case: Case) -> None:
    plan = case.plan
    for rank, payload in zip(plan.ranks, plan.bytes_to_rank, strict=True):
        regions = [(t.layout.region(t.spec.shape, rank), t.spec.dtype.itemsize) for t in plan.tensors]
        expected = sum(region.numel * itemsize for region, itemsize in regions if region is not None)
        assert payload == (0 if rank == plan.source_rank else expected)
    assert list(pieces_of(plan, plan.source_rank)) == []
    assert plan.network_bytes == sum(plan.bytes_to_rank)


@given(case=cases())
def test_equal_arguments_make_an_equal_plan(case: Case) -> None:
    again = plan_scatter(
        list(case.plan.tensors),
        ranks=list(case.plan.ranks),
        source_rank=case.plan.source_rank,
        staging_bytes=case.staging_bytes,
        direct_from_bytes=case.direct_from_bytes,
    )
    assert again == case.plan


@given(case=cases())
def test_tensors_travel_in_their_order_and_the_last_bucket_is_known(case: Case) -> None:
    plan = case.plan
    last: dict[int, int] = {}
    for index, bucket in enumerate(plan.buckets):
        if isinstance(bucket, DirectBucket):
            last[bucket.tensor] = index
            continue
        assert any(bucket.slots)  # no collective moves nothing
        for slot in bucket.slots:
            last.update((piece.tensor, index) for piece in slot)
    assert plan.last_bucket_of_tensor == last
    assert list(plan.buckets) == [*direct(plan), *packed(plan)]
    orders = [[piece.tensor for piece in pieces_of(plan, rank)] for rank in plan.ranks]
    for order in [[bucket.tensor for bucket in direct(plan)], *orders]:
        assert order == sorted(order)


def plan_of(
    tensor: PlannedTensor, *, ranks: int, staging_bytes: int, direct_from_bytes: int | None
) -> ScatterPlan:
    return plan_scatter(
        [tensor],
        ranks=range(ranks),
        source_rank=0,
        staging_bytes=staging_bytes,
        direct_from_bytes=direct_from_bytes,
    )


def sharded(placement: Placement, *, ranks: int) -> Layout:
    return Layout(mesh_shape=(ranks,), mesh_ranks=tuple(range(ranks)), placements=(placement,))


def test_equal_runs_of_rows_travel_directly_from_the_given_size_on() -> None:
    even = planned("weight", (4, 8), torch.float32, sharded(Shard(0), ranks=2))  # 64 bytes on each rank
    straight = plan_of(even, ranks=2, staging_bytes=1024, direct_from_bytes=64)
    assert straight.buckets == (
        DirectBucket(
            tensor=0, regions=(Region(start=(0, 0), stop=(2, 8)), Region(start=(2, 0), stop=(4, 8)))
        ),
    )
    assert (straight.slot_bytes, straight.bytes_to_rank) == (0, (0, 64))
    for limit in (65, None):
        assert direct(plan_of(even, ranks=2, staging_bytes=1024, direct_from_bytes=limit)) == []


def test_a_direct_tensor_is_cut_into_equal_parts_on_all_ranks() -> None:
    tensor = planned("weight", (10, 4), torch.float32, sharded(Shard(0), ranks=2))
    plan = plan_of(tensor, ranks=2, staging_bytes=2 * 2 * 32, direct_from_bytes=1)
    cuts = [[(region.start[0], region.stop[0]) for region in bucket.regions] for bucket in direct(plan)]
    assert cuts == [[(0, 2), (5, 7)], [(2, 4), (7, 9)], [(4, 5), (9, 10)]]


@pytest.mark.parametrize(
    ("shape", "placement"),
    [((5, 8), Shard(0)), ((4, 8), Shard(1)), ((4, 8), Replicate())],
    ids=["uneven", "columns", "replicated"],
)
def test_other_regions_are_packed(shape: tuple[int, ...], placement: Placement) -> None:
    tensor = planned("weight", shape, torch.float32, sharded(placement, ranks=2))
    plan = plan_of(tensor, ranks=2, staging_bytes=4096, direct_from_bytes=1)
    assert direct(plan) == []
    assert len(packed(plan)) == 1


def test_small_tensors_share_a_bucket() -> None:
    layout = Layout.replicated([0, 1])
    tensors = [planned(f"t{i}", (3,), torch.float32, layout) for i in range(4)]  # 12 bytes, 16 in a slot
    plan = plan_scatter(
        tensors, ranks=[0, 1], source_rank=0, staging_bytes=2 * 2 * 64, direct_from_bytes=None
    )
    assert len(plan.buckets) == 1
    assert [piece.offset_bytes for piece in pieces_of(plan, 1)] == [0, 16, 32, 48]
    assert plan.slot_bytes == 64
    assert plan.bytes_to_rank == (0, 48)


def test_a_large_tensor_is_cut_along_its_rows() -> None:
    plan = plan_scatter(
        [planned("weight", (10, 4), torch.float32, Layout.replicated([0, 1]))],
        ranks=[0, 1],
        source_rank=1,
        staging_bytes=2 * 2 * 48,
        direct_from_bytes=None,
    )
    cuts = [(piece.region.start[0], piece.region.stop[0]) for piece in pieces_of(plan, 0)]
    assert cuts == [(0, 3), (3, 6), (6, 9), (9, 10)]


def test_one_rank_needs_no_bucket() -> None:
    plan = plan_scatter(
        [planned("weight", (8,), torch.float32, Layout.replicated([0]))],
        ranks=[0],
        source_rank=0,
        staging_bytes=1024,
        direct_from_bytes=1,
    )
    assert (plan.buckets, plan.slot_bytes, plan.network_bytes) == ((), 0, 0)


def test_a_staging_size_without_room_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(ConfigurationError) as caught:
        plan_scatter([], ranks=[0, 1, 2, 3], source_rank=0, staging_bytes=127, direct_from_bytes=None)
    assert str(caught.value) == "staging_bytes: expected at least 128 for 4 ranks, got 127"
    plan_scatter([], ranks=[0, 1, 2, 3], source_rank=0, staging_bytes=128, direct_from_bytes=None)


def test_the_source_must_be_one_of_the_ranks() -> None:
    with pytest.raises(ConfigurationError) as caught:
        plan_scatter([], ranks=[1, 2], source_rank=0, staging_bytes=1024, direct_from_bytes=None)
    assert str(caught.value) == "scatter plan: source rank 0 is not one of the ranks (1, 2)"
