"""What can be followed through an operation, and what ends a trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shardwise.conversion.tracing import NotTraceableError, TracedTensor


def source(*shape: int) -> TracedTensor:
    return TracedTensor.of_source("s", shape, torch.float32)


@pytest.mark.parametrize(
    "operation",
    [
        lambda t: t * 2,
        lambda t: t + 1,
        lambda t: t.to(torch.bfloat16),
        lambda t: t.view(torch.int32),
        lambda t: t.flip(0),
        lambda t: t.roll(1, 0),
        lambda t: t.sum(0),
        lambda t: t[::2],
        lambda t: t[torch.tensor([1, 0])],
        lambda t: t.expand(2, 4, 6),
        lambda t: torch.where(t > 0, t, -t),
        lambda t: t.clone().zero_(),
    ],
)
def test_what_does_more_than_move_elements_ends_the_trace(
    operation: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    with pytest.raises(NotTraceableError):
        operation(source(4, 6))


def test_a_value_cannot_be_asked_for() -> None:
    with pytest.raises((NotTraceableError, RuntimeError)):
        source(1).item()
    with pytest.raises((NotTraceableError, RuntimeError)):
        bool(source(1) > 0)


def test_tensors_of_several_dtypes_are_not_joined() -> None:
    other = TracedTensor.of_source("o", (4, 6), torch.bfloat16)
    with pytest.raises(NotTraceableError):
        torch.cat([source(4, 6), other])


def test_a_reshape_across_the_border_of_a_part_ends_the_trace() -> None:
    joined = torch.cat([source(3, 2), source(2, 2)])  # 10 elements in parts of 6 and 4
    with pytest.raises(NotTraceableError, match="across the border"):
        joined.reshape(2, 5)


def test_shape_dtype_and_type_are_what_an_operation_would_see() -> None:
    tensor = source(4, 6).transpose(0, 1)
    assert isinstance(tensor, torch.Tensor)
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == ((6, 4), torch.float32, False)
    assert tensor.contiguous().is_contiguous()
    assert "parts=1" in repr(tensor)


def test_an_empty_source_has_no_parts() -> None:
    joined = torch.cat([source(0, 3), source(2, 3)])
    assert isinstance(joined, TracedTensor)
    assert len(joined.parts) == 1
