"""Which region each rank owns, against torch's own placement rules."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from shardwise.errors import ConfigurationError, UnsupportedParameterError
from shardwise.plan import Layout

sizes = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 11, 13])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], Layout]:
    """Draw a full tensor's shape and a layout of it over one or two mesh axes."""
    shape = tuple(draw(st.lists(sizes, min_size=1, max_size=3)))
    mesh_shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=2)))
    ranks = draw(st.permutations(range(math.prod(mesh_shape))))
    shards = st.integers(0, len(shape) - 1).map(Shard)
    placements = tuple(draw(st.one_of(shards, st.just(Replicate()))) for _ in mesh_shape)
    return shape, Layout(mesh_shape=mesh_shape, mesh_ranks=tuple(ranks), placements=placements)


def one_axis(ranks: int, placement: Placement) -> Layout:
    return Layout(mesh_shape=(ranks,), mesh_ranks=tuple(range(ranks)), placements=(placement,))


def coordinates(layout: Layout) -> list[tuple[int, tuple[int, ...]]]:
    """Return each rank and its coordinate, in row-major order of the mesh."""
    grid = itertools.product(*(range(size) for size in layout.mesh_shape))
    return list(zip(layout.mesh_ranks, grid, strict=True))


def replicas(layout: Layout) -> int:
    return math.prod(
        size
        for size, placement in zip(layout.mesh_shape, layout.placements, strict=True)
        if isinstance(placement, Replicate)
    )


HSDP = Layout(mesh_shape=(2, 3), mesh_ranks=tuple(range(6)), placements=(Replicate(), Shard(0)))
SAME_DIM = Layout(mesh_shape=(2, 3), mesh_ranks=tuple(range(6)), placements=(Shard(0), Shard(0)))
TWO_DIMS = Layout(mesh_shape=(2, 3), mesh_ranks=tuple(range(6)), placements=(Shard(1), Shard(0)))


@given(case=layouts())
@example(case=((7, 3), HSDP))
@example(case=((7, 3), SAME_DIM))
@example(case=((7, 3), TWO_DIMS))
@example(case=((2, 5), one_axis(4, Shard(0))))
def test_regions_are_torchs_own(case: tuple[tuple[int, ...], Layout]) -> None:
    shape, layout = case
    for rank, coordinate in coordinates(layout):
        region = layout.region(shape, rank)
        local_shape, offset = _compute_local_shape_and_global_offset(
            shape, layout.mesh_shape, list(coordinate), layout.placements
        )
        assert region is not None
        assert region.shape == local_shape
        if region.numel > 0:  # an empty region lies nowhere
            assert region.start == offset


@given(case=layouts())
@example(case=((7, 3), SAME_DIM))
@example(case=((7, 3), TWO_DIMS))
@example(case=((1, 5), one_axis(5, Shard(0))))
def test_every_element_is_owned_once_per_replica(case: tuple[tuple[int, ...], Layout]) -> None:
    shape, layout = case
    owners = torch.zeros(shape, dtype=torch.int64)
    for rank in layout.mesh_ranks:
        region = layout.region(shape, rank)
        assert region is not None
        owners[region.slices()] += 1
    assert torch.equal(owners, torch.full(shape, replicas(layout), dtype=torch.int64))


def test_fewer_rows_than_ranks_leave_the_last_ranks_empty() -> None:
    layout = one_axis(5, Shard(0))
    shapes = [layout.region((3, 2), rank).shape for rank in range(5)]  # type: ignore[union-attr]
    assert shapes == [(1, 2), (1, 2), (1, 2), (0, 2), (0, 2)]


def test_a_replicated_scalar_is_whole_on_every_rank() -> None:
    layout = Layout.replicated([0, 2, 5])
    for rank in (0, 2, 5):
        region = layout.region((), rank)
        assert region is not None
        assert region.numel == 1


def test_a_rank_outside_of_the_mesh_owns_nothing() -> None:
    layout = Layout.replicated([1, 3])
    assert layout.coordinate(0) is None
    assert layout.region((4,), 0) is None


def test_coordinates_are_row_major() -> None:
    layout = Layout(mesh_shape=(2, 3), mesh_ranks=(9, 8, 7, 6, 5, 4), placements=(Replicate(), Shard(0)))
    assert [layout.coordinate(rank) for rank in (9, 7, 6, 4)] == [(0, 0), (0, 2), (1, 0), (1, 2)]


def test_a_partial_sum_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedParameterError) as caught:
        Layout(mesh_shape=(2, 2), mesh_ranks=(0, 1, 2, 3), placements=(Shard(0), Partial()))
    message = str(caught.value)
    assert "expected Shard or Replicate on every mesh axis" in message
    assert repr(Partial()) in message
    assert "redistribute the parameter first" in message


def rows_of(layout: Layout, size: int, rank: int) -> list[int]:
    """The rows of a tensor with one dim that a rank's shard holds, in the shard's order."""
    shard = torch.full(layout.local_shape((size,), rank) or (), -1)
    for part in layout.parts((size,), rank):
        shard[part.local.slices()] = torch.arange(size)[part.region.slices()]
    return shard.tolist()


@given(
    size=st.integers(0, 24),
    factor=st.integers(2, 4),
    ranks=st.integers(1, 5),
    outer=st.integers(1, 3),
)
@example(size=9, factor=2, ranks=4, outer=1)
def test_strided_shards_are_torchs_own(size: int, factor: int, ranks: int, outer: int) -> None:
    placements = (Shard(0), _StridedShard(0, split_factor=factor))
    layout = Layout(mesh_shape=(outer, ranks), mesh_ranks=tuple(range(outer * ranks)), placements=placements)
    for rank, (outer_index, index) in coordinates(layout):
        chunk = Shard(0)._split_tensor(torch.arange(size), outer, with_padding=False)[0][outer_index]
        expected = (
            []
            if chunk.numel() == 0
            else placements[1]._split_tensor(chunk, ranks, with_padding=False)[0][index].tolist()
        )
        assert rows_of(layout, size, rank) == expected


@given(size=st.integers(0, 40), tp=st.integers(1, 5), fsdp=st.integers(1, 5))
@example(size=9, tp=2, fsdp=4)  # torch's own arithmetic on the placements gives row 8 to the wrong rank here
def test_fsdp_on_top_of_tensor_parallelism_cuts_the_tp_shard(size: int, tp: int, fsdp: int) -> None:
    layout = Layout(
        mesh_shape=(fsdp, tp),
        mesh_ranks=tuple(range(fsdp * tp)),
        placements=(_StridedShard(0, split_factor=tp), Shard(0)),
    )
    for rank, (fsdp_index, tp_index) in coordinates(layout):
        of_tp = Shard(0)._split_tensor(torch.arange(size), tp, with_padding=False)[0][tp_index]
        expected = Shard(0)._split_tensor(of_tp, fsdp, with_padding=False)[0][fsdp_index]
        assert rows_of(layout, size, rank) == expected.tolist()
        region = layout.region((size,), rank)
        assert region is not None
        assert region.shape == layout.local_shape((size,), rank)


def test_several_boxes_have_no_single_region() -> None:
    layout = one_axis(2, _StridedShard(0, split_factor=2))
    with pytest.raises(UnsupportedParameterError, match="expected one box per rank"):
        layout.region((8,), 0)
    assert [part.region.start[0] for part in layout.parts((8,), 1)] == [2, 6]


@pytest.mark.parametrize(
    ("mesh_shape", "mesh_ranks"), [((2,), (0, 1, 2)), ((2, 2), (0, 1)), ((3,), (0, 1, 1))]
)
def test_ranks_must_fill_the_mesh_once(mesh_shape: tuple[int, ...], mesh_ranks: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Layout(mesh_shape=mesh_shape, mesh_ranks=mesh_ranks, placements=(Shard(0),) * len(mesh_shape))
    assert str(caught.value) == (
        f"layout: expected {math.prod(mesh_shape)} different ranks for a mesh of shape {mesh_shape}, "
        f"got {mesh_ranks}"
    )


def test_each_axis_needs_a_placement() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Layout(mesh_shape=(2, 2), mesh_ranks=(0, 1, 2, 3), placements=(Shard(0),))
    assert "expected one placement per mesh axis (2), got (Shard(dim=0),)" in str(caught.value)


@pytest.mark.parametrize("dim", [2, -1])
def test_a_dim_that_the_tensor_lacks_is_refused(dim: int) -> None:
    layout = one_axis(2, Shard(dim))
    with pytest.raises(ConfigurationError) as caught:
        layout.region((4, 4), 0)
    assert (
        str(caught.value)
        == f"layout: expected placements on dims of a tensor of shape (4, 4), got Shard(dim={dim})"
    )
