"""glibc's heap as a new process has it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD = -3  # of malloc.h
_OF_A_NEW_PROCESS_BYTES = 128 * 2**10
_LEARNT_BYTES = 32 * 2**20


@contextmanager
def large_blocks_given_back() -> Iterator[None]:
    """Let the system have freed blocks of 128 KiB and more back at once, as in a process that has freed nothing large yet.

    A rank of the pool has, and glibc has learnt from it to keep freed blocks of up to 32 MiB: in the arena of the thread that made them,
    where others do not find them.
    """
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallopt(_M_MMAP_THRESHOLD, _OF_A_NEW_PROCESS_BYTES)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _LEARNT_BYTES)
