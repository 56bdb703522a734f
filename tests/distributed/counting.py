"""Counts of what a load asks the system for and moves about in memory: what a clock on a busy machine cannot tell."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import tracemalloc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WITHOUT_VALUES = ("empty", "new_empty", "zeros", "new_zeros", "zero_", "fill_")
"""Operations that move no values: those that make storage, and those that set padding."""


@dataclass(kw_only=True)
class Counts:
    """Of one load on one rank. Bytes of tensors are those on the host."""

    opens: int = 0  # of the checkpoint's files
    mappings: int = 0  # of them
    reads: int = 0  # calls of the system that return bytes of tensors
    read_bytes: int = 0  # that they returned
    moved_bytes: int = 0  # written by operations of torch that move values
    allocated: list[tuple[int, int]] = field(
        default_factory=list
    )  # address and bytes of each storage that was made
    python_peak_bytes: int = 0  # of what Python and NumPy held, beyond what they held before
    mapped_ranges: list[range] = field(default_factory=list)  # addresses of the checkpoint's pages
    network_bytes: int = 0
    shards: list[tuple[int, int]] = field(default_factory=list)  # address and bytes of each shard's storage

    @property
    def copied_bytes(self) -> int:
        """What went into memory from anywhere, however often."""
        return self.read_bytes + self.moved_bytes + self.network_bytes

    @property
    def shard_bytes(self) -> int:
        """Of all shards."""
        return sum(nbytes for _, nbytes in self.shards)

    @property
    def other_allocations(self) -> list[int]:
        """Bytes of each storage that was made and is no shard's."""
        shards = {address for address, _ in self.shards}
        return [nbytes for address, nbytes in self.allocated if address not in shards]


@contextlib.contextmanager
def counting(values_start: Mapping[str, int]) -> Iterator[Counts]:
    """Count what the body does, on all of its threads but for operations of torch, which are counted on this one.

    Args:
        values_start: Of each file of the checkpoint, by path: where its header ends, in bytes.
    """
    counts, lock = Counts(), threading.Lock()
    starts = {os.stat(path).st_ino: start for path, start in values_start.items()}
    preadv, os_open, real_mmap = os.preadv, os.open, mmap.mmap

    def counted_preadv(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        got = preadv(fd, buffers, offset, *flags)
        if not flags and offset >= starts.get(os.fstat(fd).st_ino, 0):  # else it asks what is in memory
            with lock:
                counts.reads += 1
                counts.read_bytes += got
        return got

    def counted_open(path: Any, *args: Any, **keywords: Any) -> int:
        if str(path) in values_start:
            with lock:
                counts.opens += 1
        return os_open(path, *args, **keywords)

    class CountedMap(real_mmap):
        def __new__(cls, fd: int, length: int, *args: Any, **keywords: Any) -> Any:
            made = super().__new__(cls, fd, length, *args, **keywords)
            if fd >= 0 and os.fstat(fd).st_ino in starts:
                address = torch.frombuffer(made, dtype=torch.uint8).data_ptr()
                with lock:
                    counts.mappings += 1
                    counts.mapped_ranges.append(range(address, address + length))
            return made

    with (
        mock.patch.object(os, "preadv", counted_preadv),
        mock.patch.object(os, "open", counted_open),
        mock.patch.object(mmap, "mmap", CountedMap),
        _TensorCounts(counts),
    ):
        tracemalloc.start(1)
        try:
            yield counts
            counts.python_peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


class _TensorCounts(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace != "aten":
            return result  # of collectives, which the report counts
        schema = func._schema
        name = schema.name.removeprefix("aten::").removesuffix("_like").removesuffix("_strided")
        moves = name not in _WITHOUT_VALUES
        for argument, value in zip(schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and moves:
                self._counts.moved_bytes += sum(tensor.nbytes for tensor in _on_host(value))
        if all(returned.alias_info is None for returned in schema.returns):
            for tensor in _on_host(result):
                storage = tensor.untyped_storage()
                self._counts.allocated.append((storage.data_ptr(), storage.nbytes()))
                self._counts.moved_bytes += tensor.nbytes if moves else 0
        return result


def _on_host(values: Any) -> Iterator[torch.Tensor]:
    for leaf in tree_leaves(values):
        tensor = leaf._local_tensor if isinstance(leaf, DTensor) else leaf
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
            yield tensor


def values_start_of(directory: Path) -> dict[str, int]:
    """Return where the header of each safetensors file ends, by path."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            found[str(path)] = 8 + int.from_bytes(file.read(8), "little")
    return found
