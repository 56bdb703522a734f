"""Run a conversion on tensors that have no values but know where each of their elements comes from.

A traced tensor carries the pieces of the source tensors that it consists of. torch breaks whatever an operation does with it
down to a few primitives; those that only move elements are followed here, and any other one ends the trace: what it
would compute cannot be found by looking up elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardwise.conversion.pieces import Loop, Piece, made_of, whole

aten: Any = torch.ops.aten


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of one source tensor.

    Args:
        source: Its checkpoint name.
        piece: Where its elements go.
    """

    source: str
    piece: Piece


Parts = tuple[Part, ...]
Shape = tuple[int, ...]


class NotTraceableError(Exception):
    """An operation does more than move elements; its message says which. The whole tensors are converted then."""


class TracedTensor(torch.Tensor):
    """A tensor without values whose elements are known by their places in source tensors.

    Args:
        like: On meta; of its shape, strides and dtype.
        parts: That together cover it once.
    """

    parts: Parts
    like: torch.Tensor

    @staticmethod
    def __new__(cls, like: torch.Tensor, parts: Parts) -> TracedTensor:
        """Make the wrapper; device and strides are what an operation would see of a loaded tensor."""
        made: TracedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            dtype=like.dtype,
            device=torch.device("cpu"),
            requires_grad=False,
        )
        made.like, made.parts = like, parts
        return made

    @classmethod
    def of_source(cls, name: str, shape: Shape, dtype: torch.dtype) -> TracedTensor:
        """Return the tensor that is a source as it is."""
        parts = (Part(source=name, piece=whole(shape)),) if math.prod(shape) else ()
        return cls(torch.empty(shape, dtype=dtype, device="meta"), parts)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Return shape and number of parts; the default would ask for values."""
        return f"TracedTensor(shape={tuple(self.shape)}, parts={len(self.parts)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Follow one primitive, or end the trace."""
        follow = _FOLLOWED.get(func.overloadpacket)
        if follow is None:
            raise NotTraceableError(f"{func} does more than move elements")
        kwargs = kwargs or {}
        try:
            like = func(*_without_parts(args), **kwargs)
            if isinstance(like, torch.Tensor):
                return cls(like, tuple(follow(args, kwargs, like)))
            return [
                cls(each, tuple(parts)) for each, parts in zip(like, follow(args, kwargs, like), strict=True)
            ]
        except (
            TypeError,
            AttributeError,
        ) as error:  # an argument that the primitive's follower does not take
            raise NotTraceableError(f"{func}: {error}") from error


def _without_parts(value: Any) -> Any:
    if isinstance(value, TracedTensor):
        return value.like
    if isinstance(value, (tuple, list)):
        return type(value)(_without_parts(each) for each in value)
    return value


def _same(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: torch.Tensor) -> Parts:
    if out.dtype != args[0].dtype:
        raise NotTraceableError(f"a cast from {args[0].dtype} to {out.dtype}")
    return args[0].parts  # type: ignore[no-any-return]


def _reshaped(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: torch.Tensor) -> Iterator[Part]:
    shape, to = tuple(args[0].shape), tuple(out.shape)
    if out.dtype != args[0].dtype:
        raise NotTraceableError("a view in another dtype")
    for part in args[0].parts:
        yield Part(source=part.source, piece=_reshape(part.piece, shape, to))


def _permuted(order: Callable[[tuple[Any, ...], int], Sequence[int]]) -> Any:
    def follow(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: torch.Tensor) -> Iterator[Part]:
        dims = [dim % max(out.ndim, 1) for dim in order(args, out.ndim)]
        place = {old: new for new, old in enumerate(dims)}
        for part in args[0].parts:
            piece = part.piece
            loops = [(size, source, place[dim], target) for size, source, dim, target in _loops(piece)]
            start = tuple(piece.target_start[old] for old in dims)
            yield _part(part.source, loops, piece.source_start, start)

    return follow


def _swapped(args: tuple[Any, ...], ndim: int) -> list[int]:
    dims = list(range(ndim))
    first, second = (args[1], args[2]) if len(args) > 2 else (0, 1)
    if ndim > 1:
        dims[first], dims[second] = dims[second], dims[first]
    return dims


def _sliced(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: torch.Tensor) -> Iterator[Part]:
    dim, start, step = (
        _argument(args, kwargs, at, name, default)
        for at, name, default in ((1, "dim", 0), (2, "start", None), (4, "step", 1))
    )
    if step != 1:
        raise NotTraceableError(f"a slice with step {step}")
    size = args[0].shape[dim]
    low, _, _ = slice(start, None).indices(size)
    yield from _cut(args[0], dim, low, low + out.shape[dim])


def _selected(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: torch.Tensor) -> Iterator[Part]:
    tensor, dim, index = args[0], _argument(args, kwargs, 1, "dim", 0), _argument(args, kwargs, 2, "index", 0)
    index %= tensor.shape[dim]
    yield from _without_dim(_cut(tensor, dim, index, index + 1), dim % tensor.ndim)


def _split(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Sequence[torch.Tensor]
) -> Iterator[list[Part]]:
    dim = _argument(args, kwargs, 2, "dim", 0)
    low = 0
    for each in out:
        yield list(_cut(args[0], dim, low, low + each.shape[dim]))
        low += each.shape[dim]


def _unbound(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Sequence[torch.Tensor]
) -> Iterator[list[Part]]:
    dim = _argument(args, kwargs, 1, "dim", 0) % args[0].ndim
    for index in range(len(out)):
        yield list(_without_dim(_cut(args[0], dim, index, index + 1), dim))


def _concatenated(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: torch.Tensor) -> Iterator[Part]:
    dim = _argument(args, kwargs, 1, "dim", 0) % out.ndim
    low = 0
    for tensor in args[0]:
        if tensor.dtype != out.dtype:
            raise NotTraceableError("tensors of several dtypes")
        by = tuple(low if d == dim else 0 for d in range(out.ndim))
        for part in tensor.parts:
            yield Part(source=part.source, piece=part.piece.moved(by))
        low += tensor.shape[dim] if tensor.ndim == out.ndim else 0  # torch.cat skips empty vectors of one dim


def _stacked(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: torch.Tensor) -> Iterator[Part]:
    dim = _argument(args, kwargs, 1, "dim", 0) % out.ndim
    for index, tensor in enumerate(args[0]):
        if tensor.dtype != out.dtype:
            raise NotTraceableError("tensors of several dtypes")
        yield from _with_dim(tensor.parts, dim, at=index)


def _unsqueezed(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: torch.Tensor) -> Iterator[Part]:
    yield from _with_dim(args[0].parts, _argument(args, kwargs, 1, "dim", 0) % out.ndim, at=0)


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], at: int, name: str, default: Any) -> Any:
    """Return what a primitive was called with, by position or by name."""
    return args[at] if len(args) > at else kwargs.get(name, default)


# Primitives that only move elements, and how their result's parts follow from their arguments'.
_FOLLOWED: dict[Any, Any] = {
    **dict.fromkeys(
        (aten.clone, aten.detach, aten.alias, aten.lift_fresh, aten._to_copy, aten.contiguous), _same
    ),
    **dict.fromkeys(
        (aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.squeeze), _reshaped
    ),
    aten.permute: _permuted(lambda args, ndim: args[1]),
    aten.transpose: _permuted(_swapped),
    aten.t: _permuted(_swapped),
    aten.slice: _sliced,
    aten.select: _selected,
    aten.split: _split,
    aten.split_with_sizes: _split,
    aten.unbind: _unbound,
    aten.cat: _concatenated,
    aten.stack: _stacked,
    aten.unsqueeze: _unsqueezed,
}


def backwards(piece: Piece, *, shape: Shape, source_shape: Shape) -> Piece:
    """Return the copy back: from what was made, as the source, to places in the tensor that it was made of.

    Args:
        piece: Of a tensor of `source_shape`; its targets are places in one of `shape`.
        shape: Of what was made.
        source_shape: Of what it was made of.

    Raises:
        NotTraceableError: Its elements are not regular steps along the dims of the source.
    """
    return _reshape(piece.reversed(shape), (math.prod(source_shape),), source_shape)


def _loops(piece: Piece) -> Iterator[Loop]:
    return zip(piece.sizes, piece.source_strides, piece.target_dims, piece.target_strides, strict=True)


def _part(source: str, loops: Sequence[Loop], source_start: int, target_start: Shape) -> Part:
    return Part(source=source, piece=made_of(loops, source_start=source_start, target_start=target_start))


def _cut(tensor: TracedTensor, dim: int, low: int, high: int) -> Iterator[Part]:
    dim %= tensor.ndim
    by = tuple(-low if d == dim else 0 for d in range(tensor.ndim))
    for part in tensor.parts:
        for piece in part.piece.cut_target(dim, low, high):
            yield Part(source=part.source, piece=piece.moved(by))


def _without_dim(parts: Iterator[Part], dim: int) -> Iterator[Part]:
    """Take out a dim of one element."""
    for part in parts:
        piece = part.piece
        loops = [(n, source, d - (d > dim), target) for n, source, d, target in _loops(piece)]
        start = piece.target_start[:dim] + piece.target_start[dim + 1 :]
        yield _part(part.source, loops, piece.source_start, start)


def _with_dim(parts: Parts, dim: int, *, at: int) -> Iterator[Part]:
    """Put in a dim, all elements at one place of it."""
    for part in parts:
        piece = part.piece
        loops = [(n, source, d + (d >= dim), target) for n, source, d, target in _loops(piece)]
        start = (*piece.target_start[:dim], at, *piece.target_start[dim:])
        yield _part(part.source, loops, piece.source_start, start)


def _reshape(piece: Piece, shape: Shape, to: Shape) -> Piece:
    """Return a piece of a tensor of `shape` in the same elements, row-major, of shape `to`."""
    strides, new_strides = _row_major(shape), _row_major(to)
    place = sum(at * stride for at, stride in zip(piece.target_start, strides, strict=True))
    start = []
    for size, stride in zip(to, new_strides, strict=True):
        start.append(place // stride % size)
    reach = list(start)
    loops: list[Loop] = []
    for size, source, dim, target in _loops(piece):
        for part in _spread(size, source, target * strides[dim], to, new_strides):
            loops.append(part)
            reach[part[2]] += (part[0] - 1) * part[3]
    if any(last >= size for last, size in zip(reach, to, strict=True)):
        raise NotTraceableError(f"a reshape from {shape} to {to} across the border of a part")
    return made_of(loops, source_start=piece.source_start, target_start=tuple(start))


def _spread(size: int, source: int, stride: int, to: Shape, strides: Shape) -> Iterator[Loop]:
    """Yield a loop over flat places as loops along the dims of shape `to`."""
    dim = next((d for d in range(len(to)) if to[d] > 1 and strides[d] <= stride), None)
    if dim is None or stride % strides[dim]:
        raise NotTraceableError(f"a reshape to {to} that takes steps of {stride} elements apart")
    room = strides[dim] * to[dim]  # of this dim, in elements
    if size * stride <= room or dim == 0:
        yield size, source, dim, stride // strides[dim]
        return
    inside = room // stride
    if room % stride or size % inside:
        # The loop ends before it reaches the next outer dim, or it does not fit at all; the caller checks its reach.
        yield size, source, dim, stride // strides[dim]
        return
    yield inside, source, dim, stride // strides[dim]
    yield from _spread(size // inside, source * inside, stride * inside, to, strides)


def _row_major(shape: Shape) -> Shape:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
