"""Give memory that was freed back to the system, where the C library would keep it for the next allocation."""

from __future__ import annotations

import ctypes
import mmap

import torch


def give_back_freed() -> None:
    """Return freed pages of the heap to the system; nothing where the C library is not glibc.

    glibc raises the size from which an allocation has pages of its own up to 32 MiB when such pages are freed. A tensor
    below that size then lies in the heap, and stays in it after it is gone.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def in_own_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an empty tensor in pages that go back to the system at once: malloc would keep some of them, and the next would come on top."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if not nbytes:
        return torch.empty(shape, dtype=dtype, device="cpu")
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
