"""Regions cut into parts that fit into a bucket."""

from __future__ import annotations

import math

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from shardwise.plan.boxes import split_region
from shardwise.tensors import Region


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
