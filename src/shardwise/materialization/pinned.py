"""Host memory that a device reads by itself: of an exact size, allocated once, given back at the end."""

from __future__ import annotations

import mmap
import threading
import weakref
from contextlib import suppress
from typing import Any, Final

import torch

from shardwise.materialization.cpus import keep_to
from shardwise.materialization.device import current

_PORTABLE: Final = 1  # cudaHostRegisterPortable: pinned for every context of this process
_PART_BYTES: Final = 8 * 2**20


class PinnedMemory:
    """Pinned host memory.

    Own pages that are registered with the driver. torch's pinned allocator rounds up to powers of two and keeps what is freed;
    it serves where the driver has no such call, or refuses it.

    Args:
        nbytes: Exact size.
        device: That copies go to; it may open its context.
        threads: That touch the pages first. Which node of the machine a page lies on is decided by the CPU that touches it first.
        cpus: On which they run; None: on any.
    """

    def __init__(
        self, nbytes: int, *, device: torch.device, threads: int, cpus: frozenset[int] | None
    ) -> None:
        runtime = _runtime_of(device)
        self._unpin: Any = None
        # The context that is opened must not be another rank's.
        with current(device):
            if runtime is not None and nbytes:
                pages = _touched(nbytes, threads=threads, cpus=cpus)
                if _is_success(runtime.cudaHostRegister(pages.data_ptr(), nbytes, _PORTABLE)):
                    self.bytes = pages
                    self._unpin = weakref.finalize(self, runtime.cudaHostUnregister, pages.data_ptr())
                    self._unpin.atexit = False  # the driver may have ended before
                    return
                del pages
                # The driver's last error would be raised by the next launch of anybody's kernel.
                with suppress(RuntimeError):
                    torch.zeros(1, device=device)
            self.bytes = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def close(self) -> None:
        """Unpin the memory. No copy out of it may be on its way; who still holds `bytes` can use them as plain memory."""
        if self._unpin is not None:
            self._unpin()  # before the pages go, whose address may be another thread's in the next moment
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        if self._unpin is None:
            _empty_host_cache()


def _runtime_of(device: torch.device) -> Any:
    """Return what registers host memory for a kind of device, as torch exposes it; None where it does not."""
    runtime = getattr(torch.get_device_module(device), "cudart", None)
    found = runtime() if runtime is not None else None
    return found if hasattr(found, "cudaHostRegister") else None


def _empty_host_cache() -> None:
    # torch 2.11 has no public name for it.
    empty: Any = getattr(torch.accelerator, "empty_host_cache", getattr(torch._C, "_host_emptyCache", None))
    if empty is not None:
        empty()


def _is_success(status: Any) -> bool:
    return int(status) == 0


def _touched(nbytes: int, *, threads: int, cpus: frozenset[int] | None) -> torch.Tensor:
    """Return anonymous pages that exist. Registering would make them one by one, on the calling thread's node."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # large pages are made, and pinned, many times quicker
        pages.madvise(mmap.MADV_HUGEPAGE)
    # After a fork the next write would go to a copy of the page, and the device would go on reading the one it knows.
    with suppress(AttributeError, OSError):
        pages.madvise(mmap.MADV_DONTFORK)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    left = list(torch.split(memory, _PART_BYTES))

    def touch() -> None:
        keep_to(cpus)
        with suppress(IndexError):
            while True:
                left.pop()[:: mmap.PAGESIZE].zero_()

    running = [threading.Thread(target=touch, name="shardwise-touch", daemon=True) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return memory
