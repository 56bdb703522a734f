"""Random tensor values that are the same on every machine and with every library version."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch

_CHUNK_ELEMENTS: Final = 1 << 20
_UNIFORM_VALUES: Final = 1 << 16
# The sum of two uniform 16-bit integers has a triangular distribution around this mean.
_MEAN: Final = float(_UNIFORM_VALUES - 1)
_STANDARD_DEVIATION: Final = ((_UNIFORM_VALUES**2 - 1) / 6) ** 0.5


def random_bytes(
    name: str, *, elements: int, seed: int, standard_deviation: float, dtype: torch.dtype
) -> Iterator[bytes]:
    """Yield the values of one tensor as little-endian bytes, chunk by chunk.

    The values follow from the name and the seed by integer arithmetic, one exact conversion and one correctly
    rounded product: no mathematical library has a say in them.

    Args:
        name: The tensor's name.
        elements: Number of values.
        seed: Of the whole checkpoint.
        standard_deviation: Of the values, around zero.
        dtype: A floating-point dtype.

    Source:
        PCG64 (O'Neill 2014) by NumPy, which keeps the streams of its bit generators fixed (NEP 19).
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = np.random.PCG64(int.from_bytes(digest[:16], "little"))
    scale = np.float32(standard_deviation / _STANDARD_DEVIATION)
    for start in range(0, elements, _CHUNK_ELEMENTS):
        count = min(_CHUNK_ELEMENTS, elements - start)
        words = generator.random_raw((count + 1) // 2).astype("<u8", copy=False)
        halves = words.view("<u2")[: 2 * count]
        # Sums below 2**24 are exact in fp32, and so is taking the mean away.
        values = np.add(halves[0::2], halves[1::2], dtype=np.float32)
        values -= np.float32(_MEAN)
        values *= scale
        yield _bytes_of(torch.from_numpy(values).to(dtype))


def constant_bytes(value: float, *, elements: int, dtype: torch.dtype) -> Iterator[bytes]:
    """Yield a tensor of one value as bytes, chunk by chunk."""
    for start in range(0, elements, _CHUNK_ELEMENTS):
        yield _bytes_of(torch.full((min(_CHUNK_ELEMENTS, elements - start),), value, dtype=dtype))


def _bytes_of(values: torch.Tensor) -> bytes:
    return values.view(torch.uint8).numpy().tobytes()
