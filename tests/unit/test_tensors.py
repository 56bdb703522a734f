"""Regions and tensor specifications."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import ConfigurationError
from shardwise.tensors import Region, TensorSpec

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def regions_inside(draw: st.DrawFn, outer: Region) -> Region:
    pairs = [
        sorted(draw(st.tuples(st.integers(low, high), st.integers(low, high))))
        for low, high in zip(outer.start, outer.stop, strict=True)
    ]
    return Region(start=tuple(low for low, _ in pairs), stop=tuple(high for _, high in pairs))


@given(shape=shapes)
def test_the_whole_region_selects_every_element(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    region = Region.whole(shape)
    assert region.shape == shape
    assert region.numel == tensor.numel()
    assert torch.equal(tensor[region.slices()], tensor)


@given(data=st.data(), shape=shapes)
def test_shape_and_numel_are_those_of_the_indexed_tensor(data: st.DataObject, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    region = data.draw(regions_inside(Region.whole(shape)))
    part = tensor[region.slices()]
    assert tuple(part.shape) == region.shape
    assert part.numel() == region.numel


@given(data=st.data(), shape=shapes)
def test_relative_to_selects_the_same_elements_from_the_outer_region(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    outer = data.draw(regions_inside(Region.whole(shape)))
    inner = data.draw(regions_inside(outer))
    local = tensor[outer.slices()]
    assert torch.equal(local[inner.relative_to(outer).slices()], tensor[inner.slices()])


def test_a_scalar_has_one_element_and_no_dims() -> None:
    region = Region.whole(())
    assert (region.shape, region.numel, region.slices()) == ((), 1, ())


def test_relative_to_refuses_a_region_that_begins_before_the_outer_one() -> None:
    with pytest.raises(ConfigurationError, match="0 <= start <= stop"):
        Region(start=(1,), stop=(4,)).relative_to(Region(start=(2,), stop=(4,)))


def test_start_and_stop_must_have_one_length() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Region(start=(0, 0), stop=(1,))
    assert str(caught.value) == "region: expected start and stop of one length, got (0, 0) and (1,)"


@pytest.mark.parametrize(("start", "stop"), [((-1,), (2,)), ((3,), (2,)), ((0, 5), (1, 4))])
def test_a_negative_box_is_refused(start: tuple[int, ...], stop: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Region(start=start, stop=stop)
    message = str(caught.value)
    assert "expected 0 <= start <= stop per dim" in message
    assert str(start) in message
    assert str(stop) in message


def test_regions_are_values() -> None:
    region = Region(start=(0,), stop=(2,))
    assert region == Region(start=(0,), stop=(2,))
    assert len({region, Region(start=(0,), stop=(2,))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        region.stop = (3,)  # type: ignore[misc]


@given(
    shape=shapes,
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.complex128]),
)
def test_nbytes_is_that_of_the_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    spec = TensorSpec(fqn="weight", shape=shape, dtype=dtype)
    assert spec.nbytes == torch.empty(shape, dtype=dtype).nbytes
