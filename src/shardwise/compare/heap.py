"""Freed memory is kept for the next step: pages fresh from the kernel cost more than the arithmetic of a small model."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Final

_TRIM_THRESHOLD: Final = -1
_MMAP_MAX: Final = -4
_NEVER_TRIMMED_BYTES: Final = 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc take large blocks from the heap, and not give them back; do nothing on another C library.

    A step of FSDP2 on CPU ranks gathers each unit into new memory. By default glibc maps blocks above 32 MiB afresh each time.

    Source: mallopt(3), M_MMAP_MAX and M_TRIM_THRESHOLD.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER_TRIMMED_BYTES)
