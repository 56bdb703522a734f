"""Give memory that was freed back to the system, where the C library would keep it for the next allocation."""

from __future__ import annotations

import ctypes


def give_back_freed() -> None:
    """Return freed pages of the heap to the system; nothing where the C library is not glibc.

    glibc raises the size from which an allocation has pages of its own up to 32 MiB when such pages are freed. A tensor
    below that size then lies in the heap, and stays in it after it is gone.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
