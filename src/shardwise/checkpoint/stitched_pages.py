"""Pages of files side by side in memory: a shard that is many runs of bytes on disk, without copying them.

A page of a file can lie at any page of memory. Runs whose places in the file and in the shard differ by the same number of bytes
modulo the page size can so follow each other as one tensor: whole pages are mapped over a reservation, and what shares a page with
another run is read into it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence

import torch

from shardwise.checkpoint.ranged_file import NORESERVE, RangedFile

_FAILED = ctypes.c_void_p(-1).value
_PROTECTION = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED = 0x10


def stitched_pages(parts: Sequence[tuple[RangedFile, int, int]], dtype: torch.dtype) -> torch.Tensor | None:
    """Return runs of bytes as one flat tensor of private pages: what is written is not seen in the files.

    Args:
        parts: File, first byte and number of bytes of each run, in the order of the tensor.
        dtype: Of the tensor.

    Returns:
        The tensor; None where this system cannot, or where the runs do not fit to each other.

    Raises:
        CheckpointError: The ends of a run cannot be read.

    Source: mmap(2), `MAP_FIXED`: pages that lie in the range already are replaced.
    """
    map_over = _map_over()
    if map_over is None or not parts:
        return None
    page = mmap.PAGESIZE
    shift = parts[0][1] % page  # of the tensor in its first page
    nbytes = sum(length for _, _, length in parts)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    try:
        reserved = mmap.mmap(-1, shift + nbytes, flags=flags, prot=_PROTECTION)
    except OSError:
        return None
    memory = memoryview(reserved)
    base = ctypes.addressof(ctypes.c_char.from_buffer(reserved))
    at = shift
    for file, start, length in parts:
        if (at - start) % page:
            return None
        first, last = -(-at // page) * page, (at + length) // page * page
        if first < last and not map_over(base + first, last - first, file.fileno(), start + first - at):
            return None
        first, last = min(first, at + length), max(last, min(first, at + length))  # of a run within a page
        for low, high in ((at, first), (last, at + length)):
            if low < high:
                file.read_into(start + low - at, memory[low:high])
        at += length
    return torch.frombuffer(reserved, dtype=dtype, count=nbytes // dtype.itemsize, offset=shift)


@functools.cache
def _map_over() -> Callable[[int, int, int, int], bool] | None:
    """Return what maps bytes of a file over addresses: (address, bytes, descriptor, offset), whether it did; None off Linux."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_long) != 8:
        return None
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = ctypes.c_void_p
    call.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    flags = mmap.MAP_PRIVATE | _MAP_FIXED | NORESERVE

    def map_over(address: int, nbytes: int, descriptor: int, offset: int) -> bool:
        return bool(call(address, nbytes, _PROTECTION, flags, descriptor, offset) != _FAILED)

    return map_over
