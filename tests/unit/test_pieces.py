"""Pieces of tensors: cut to boxes of the target, to runs of the source, and to spans."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.conversion import Piece, whole
from shardwise.conversion.pieces import made_of
from shardwise.conversion.tracing import NotTraceableError, TracedTensor
from shardwise.errors import ConfigurationError
from shardwise.materialization.placing import place_in
from shardwise.tensors import Region

UNFILLED = -1


@st.composite
def traced_views(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, tuple[Piece, ...]]:
    """Draw a tensor of its own coordinates, a chain of views of it, and the pieces that the chain consists of."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    source = torch.arange(math.prod(shape)).reshape(shape)
    view, traced = source, TracedTensor.of_source("s", shape, torch.int64)
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["swap", "split", "flatten", "narrow", "chunk", "flip halves"]))
        dim = draw(st.integers(0, view.ndim - 1))
        other = draw(st.integers(0, view.ndim - 1))
        size = view.shape[dim]
        factors = [n for n in range(1, size + 1) if size % n == 0]
        factor = draw(st.sampled_from(factors))
        low = draw(st.integers(0, size - 1))

        def apply(
            tensor: torch.Tensor,
            kind: str = kind,
            dim: int = dim,
            other: int = other,
            size: int = size,
            factor: int = factor,
            low: int = low,
        ) -> torch.Tensor:
            if kind == "swap":
                return tensor.transpose(dim, other)
            if kind == "split":
                return tensor.unflatten(dim, (factor, size // factor))
            if kind == "flatten":
                return tensor.contiguous().flatten()
            if kind == "narrow":
                return tensor.narrow(dim, low, size - low)
            if kind == "chunk":
                return tensor.chunk(2, dim)[-1]
            return torch.cat([tensor.narrow(dim, low, size - low), tensor.narrow(dim, 0, low)], dim)

        try:
            traced = apply(traced)  # type: ignore[assignment]
        except NotTraceableError:  # a reshape across the border of two parts
            break
        view = apply(view)
    assert isinstance(traced, TracedTensor)
    return source, view.contiguous(), tuple(part.piece for part in traced.parts)


def written(pieces: list[Piece], source: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Carry pieces out on coordinates; an element that none of them writes stays unfilled."""
    target = torch.full(shape, UNFILLED)
    for piece in pieces:
        values = source.reshape(-1).as_strided(piece.sizes, piece.source_strides, piece.source_start)
        place = place_in(target, piece)
        assert bool((place == UNFILLED).all()), "an element is written twice"
        place.copy_(values)
    return target


@given(case=traced_views())
def test_pieces_of_a_chain_of_views_are_what_the_views_are(
    case: tuple[torch.Tensor, torch.Tensor, tuple[Piece, ...]],
) -> None:
    source, view, pieces = case
    assert torch.equal(written(list(pieces), source, tuple(view.shape)), view)
    assert sum(piece.numel for piece in pieces) == view.numel()


@given(case=traced_views(), data=st.data())
def test_a_box_of_the_target_is_cut_out(
    case: tuple[torch.Tensor, torch.Tensor, tuple[Piece, ...]], data: st.DataObject
) -> None:
    source, view, pieces = case
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in view.shape]
    region = Region(start=tuple(low for low, _ in bounds), stop=tuple(high for _, high in bounds))
    inside = [part for piece in pieces for part in piece.within(region)]
    assert torch.equal(written(inside, source, region.shape), view[region.slices()])


@given(case=traced_views(), data=st.data())
def test_a_run_of_the_source_is_cut_out(
    case: tuple[torch.Tensor, torch.Tensor, tuple[Piece, ...]], data: st.DataObject
) -> None:
    source, view, pieces = case
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, source.numel())] * 2)))
    inside = [part for piece in pieces for part in piece.cut_source(low, high)]
    expected = torch.where((view >= low) & (view < high), view, UNFILLED)
    assert torch.equal(written(inside, source, tuple(view.shape)), expected)


@given(case=traced_views(), max_span=st.integers(1, 40))
def test_cut_pieces_span_no_more_than_the_bound(
    case: tuple[torch.Tensor, torch.Tensor, tuple[Piece, ...]], max_span: int
) -> None:
    source, view, pieces = case
    parts = [part for piece in pieces for part in piece.cut_to_span(max_span)]
    assert all(part.source_span <= max_span for part in parts)
    assert torch.equal(written(parts, source, tuple(view.shape)), view)


def test_normal_form_joins_loops_that_are_one_run() -> None:
    piece = made_of([(2, 12, 0, 3), (3, 4, 0, 1), (4, 1, 1, 1)], source_start=0, target_start=(0, 0))
    assert (piece.sizes, piece.source_strides, piece.target_dims) == ((6, 4), (4, 1), (0, 1))
    assert piece.is_one_run
    assert piece.region == Region(start=(0, 0), stop=(6, 4))


def test_a_transposed_piece_is_not_one_run() -> None:
    assert whole((3, 4)).is_one_run
    assert not made_of([(3, 1, 0, 1), (4, 3, 1, 1)], source_start=0, target_start=(0, 0)).is_one_run


def test_a_scalar_is_one_element() -> None:
    piece = whole(())
    assert (piece.numel, piece.source_span, piece.is_one_run) == (1, 1, True)
    assert piece.place_of(()) == ()


def test_nothing_has_no_piece() -> None:
    with pytest.raises(ConfigurationError, match="at least one element"):
        whole((3, 0))
