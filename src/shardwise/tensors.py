"""Frozen data about tensors that every layer shares: regions, specifications, names of dtypes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from shardwise.errors import ConfigurationError, did_you_mean


@cache  # asked for every tensor of a model
def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without its module: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


_SHORT_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def floating_dtype(dtype: object, *, others: Sequence[str | None]) -> torch.dtype | str | None:
    """Return a floating point dtype that a user named.

    Args:
        dtype: A torch dtype, or its name, long or short: `"bfloat16"`, `"torch.bfloat16"`, `"bf16"`.
        others: What may be given in its place and is returned as it is.

    Raises:
        ConfigurationError: It is none of these.
    """
    if dtype is None or isinstance(dtype, str):
        if dtype in others:
            return dtype
        name = str(dtype).removeprefix("torch.")
        found = _SHORT_NAMES.get(name, getattr(torch, name, None))
    else:
        found = dtype
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    known = [dtype_name(each) for each in _SHORT_NAMES.values()]
    allowed = ", ".join(["None" if other is None else repr(other) for other in others])
    raise ConfigurationError(
        f"dtype: expected {allowed} or a floating point torch dtype or its name, got {dtype!r}."
        f"{did_you_mean(dtype, [*known, *_SHORT_NAMES], other_words={})}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """An axis-aligned box in a tensor.

    Args:
        start: First index per dim, inclusive, in elements.
        stop: Last index per dim, exclusive, in elements.

    Raises:
        ConfigurationError: The two differ in length, or the box is negative somewhere.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise ConfigurationError(
                f"region: expected start and stop of one length, got {self.start} and {self.stop}"
            )
        if any(low < 0 or low > high for low, high in zip(self.start, self.stop, strict=True)):
            raise ConfigurationError(f"region: expected 0 <= start <= stop per dim, got {self}")

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Region:
        """Return the region that covers a tensor of `shape`."""
        return cls(start=(0,) * len(shape), stop=tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements per dim."""
        return tuple(high - low for low, high in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar's region, which has no dims."""
        return math.prod(self.shape)

    def slices(self) -> tuple[slice, ...]:
        """Return the region as an index into the tensor."""
        return tuple(slice(low, high) for low, high in zip(self.start, self.stop, strict=True))

    def intersect(self, other: Region) -> Region | None:
        """Return the common box of two regions of one tensor, or None if it is empty."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(low >= high for low, high in zip(start, stop, strict=True)):
            return None
        return Region(start=start, stop=stop)

    def relative_to(self, outer: Region) -> Region:
        """Return this region in the coordinates of `outer`, which contains it."""
        return Region(
            start=tuple(low - base for low, base in zip(self.start, outer.start, strict=True)),
            stop=tuple(high - base for high, base in zip(self.stop, outer.start, strict=True)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """What is known of a full tensor without its values.

    Args:
        fqn: Fully qualified name in the model, wrapper prefixes removed.
        shape: Of the full tensor, in elements.
        dtype: Of its elements.
    """

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the full tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize
