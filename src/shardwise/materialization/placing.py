"""The two ends of a piece in memory: its elements in a buffer of file bytes, and their places in a shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shardwise.conversion import Piece
from shardwise.plan import Fragment


def as_memory(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor in host memory, writable."""
    array: Any = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def elements_in(buffer: torch.Tensor, offset: int, dtype: torch.dtype, piece: Piece) -> torch.Tensor:
    """Return a piece's elements inside of a buffer of file bytes, one dim for each of its loops.

    Args:
        buffer: uint8, contiguous.
        offset: Of the first element, in bytes.
        dtype: As stored.
        piece: Of the stored tensor.
    """
    return strided_in(buffer, offset, dtype, piece.sizes, piece.source_strides, piece.source_span)


def packed_in(buffer: torch.Tensor, offset: int, dtype: torch.dtype, piece: Piece) -> torch.Tensor:
    """Return a piece's elements inside of a buffer that holds them one after the other in the order of its loops."""
    strides, step = [], 1
    for size in reversed(piece.sizes):
        strides.append(step)
        step *= size
    return strided_in(buffer, offset, dtype, piece.sizes, tuple(reversed(strides)), step)


def strided_in(
    buffer: torch.Tensor,
    offset: int,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    span: int,
) -> torch.Tensor:
    """Return strided elements of a byte buffer, the first one `offset` bytes from its start.

    Args:
        buffer: uint8, contiguous.
        offset: In bytes.
        dtype: Of the elements.
        sizes: Of the result.
        strides: In elements.
        span: Elements from the first to the last, both included.
    """
    run = buffer[offset : offset + span * dtype.itemsize]
    if run.storage_offset() % dtype.itemsize:
        run = run.clone()  # a header of odd length leaves the elements where torch cannot view them
    return run.view(dtype).as_strided(sizes, strides)


def place_in(shard: torch.Tensor, piece: Piece) -> torch.Tensor:
    """Return a piece's places in a shard, one dim for each of its loops."""
    strides = shard.stride()
    start = shard.storage_offset() + sum(
        at * stride for at, stride in zip(piece.target_start, strides, strict=True)
    )
    return shard.as_strided(
        piece.sizes,
        [strides[dim] * step for dim, step in zip(piece.target_dims, piece.target_strides, strict=True)],
        start,
    )


class ShardMemory:
    """Where bytes of files lie in shards as they are: no buffer is needed between the two.

    Args:
        shards: This rank's, by tensor name.
    """

    def __init__(self, shards: Mapping[str, torch.Tensor]) -> None:
        self._shards = shards
        self._memory: dict[str, memoryview | None] = {}

    def of(self, fragment: Fragment) -> memoryview | None:
        """Return the memory of a fragment's elements; None where they are no one run of host memory in the stored dtype."""
        shard = self._shards[fragment.fqn]
        if fragment.fqn not in self._memory:
            is_plain = shard.device.type == "cpu" and shard.is_contiguous()
            self._memory[fragment.fqn] = as_memory(shard) if is_plain else None
        memory = self._memory[fragment.fqn]
        if memory is None or shard.dtype != fragment.stored.dtype or not fragment.piece.is_one_run:
            return None
        run = fragment.piece.run_in(tuple(shard.shape))
        itemsize = shard.dtype.itemsize
        return memory[run.start * itemsize : run.stop * itemsize] if run is not None else None
