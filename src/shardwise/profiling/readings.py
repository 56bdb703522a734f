"""What one look at this process's host memory gives, and where the figures come from.

On Linux the kernel keeps anonymous, file-backed and shared pages apart; elsewhere only the highest
resident set size so far is to be had. A reader says in `measures` which of the two it gives.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from typing import Final, Protocol

from shardwise.errors import ConfigurationError

STATUS_PATH: Final = "/proc/self/status"
STATM_PATH: Final = "/proc/self/statm"
ROLLUP_PATH: Final = "/proc/self/smaps_rollup"

_KIB: Final = 1024
_READ_BYTES: Final = 16384  # the long files are a few KiB; one read gives one consistent state
_STATM_BYTES: Final = 160  # seven numbers
_STATUS_FIELDS: Final = re.compile(
    rb"^RssAnon:\s+(\d+) kB\nRssFile:\s+(\d+) kB\nRssShmem:\s+(\d+) kB$", re.MULTILINE
)
_PSS_FIELD: Final = re.compile(rb"^Pss:\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReading:
    """Memory of this process at one instant.

    Args:
        seconds: Time since the profile's start.
        anon_bytes: Resident anonymous memory (heap, tensors): what no file backs.
        file_bytes: Resident pages of mapped files, shared with the page cache.
        shared_bytes: Resident shared memory (tmpfs, `/dev/shm`).
        pss_bytes: Proportional set size: each page divided by the number of processes that map it.
            None where it was not read at this instant, or cannot be read on this platform.
        device_allocated_bytes: Bytes in live device tensors; None where not read.
        device_reserved_bytes: Bytes that the device's allocator holds; None where not read.
        device_peak_bytes: The allocator's own highest `device_allocated_bytes` since it was last reset,
            which is at the start of the newest profile; None where not read.
        fetched_bytes: Fetched from storage for this process so far; None where not read.
        read_bytes: Returned by this process's read calls so far; None where not read.
        received_bytes: Received by this machine's network interfaces so far; None where not read.
    """

    seconds: float
    anon_bytes: int
    file_bytes: int
    shared_bytes: int
    pss_bytes: int | None
    device_allocated_bytes: int | None
    device_reserved_bytes: int | None
    device_peak_bytes: int | None
    fetched_bytes: int | None
    read_bytes: int | None
    received_bytes: int | None


class HostReader(Protocol):
    """Reads the host memory of this process."""

    @property
    def measures(self) -> str:
        """What exactly the figures are, in one phrase."""

    def read(self) -> tuple[int, int, int]:
        """Return anonymous, file-backed and shared resident bytes."""

    def read_often(self) -> tuple[int, int, int]:
        """Return the same at a fraction of the cost: the shared ones may be those of the last `read`, and count as file-backed since."""

    def read_pss(self) -> int | None:
        """Return the proportional set size in bytes, or None where the platform has none."""

    def close(self) -> None:
        """Give back what the reader holds; it reads no more after that."""


class ProcReader:
    """Reads Linux's `/proc`.

    Source:
        `Documentation/filesystems/proc.rst` of the Linux kernel: `status`, `statm` and `smaps_rollup`. Kernels
        before 6.2 keep per-thread counters, so that a reading may lag by up to 64 pages for each thread.
    """

    __slots__ = ("_buffer", "_has_pss", "_page_bytes", "_pread", "_shared_bytes", "_statm", "_status")

    def __init__(self, *, proportional: bool = True) -> None:
        # Kept open: each system call gives up the interpreter lock, and a busy thread hands it back late.
        self._status = self._statm = -1
        self._status = os.open(STATUS_PATH, os.O_RDONLY | os.O_CLOEXEC)
        self._statm = os.open(STATM_PATH, os.O_RDONLY | os.O_CLOEXEC)
        self._buffer = ctypes.create_string_buffer(_STATM_BYTES)
        # Called without giving up the lock: the kernel answers in a microsecond, and to get the lock back may take 5 ms.
        self._pread = ctypes.PyDLL(None).pread
        self._pread.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long)
        self._pread.restype = ctypes.c_ssize_t
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._shared_bytes = 0
        self._has_pss = proportional and _read_pss() is not None

    def __del__(self) -> None:
        self.close()

    @property
    def measures(self) -> str:
        """What exactly the figures are, in one phrase."""
        pss = "Pss of /proc/self/smaps_rollup" if self._has_pss else "no Pss"
        return (
            "host: resident less shared, and shared, of /proc/self/statm, which are RssAnon, and RssFile and RssShmem of "
            f"/proc/self/status; these two are taken apart at fewer instants; {pss}"
        )

    def read(self) -> tuple[int, int, int]:
        """Return anonymous, file-backed and shared resident bytes.

        Raises:
            OSError: The reader is closed, or the kernel gives no such figures.
        """
        found = _STATUS_FIELDS.search(os.pread(self._status, _READ_BYTES, 0))
        if found is None:
            raise OSError(f"expected RssAnon, RssFile and RssShmem in {STATUS_PATH}, got none of them")
        anon, file, shared = found.groups()
        self._shared_bytes = int(shared) * _KIB
        return int(anon) * _KIB, int(file) * _KIB, self._shared_bytes

    def read_often(self) -> tuple[int, int, int]:
        """Return the same at a fraction of the cost, the shared ones as they were at the last `read`.

        Raises:
            OSError: The reader is closed.
        """
        if self._pread(self._statm, self._buffer, _STATM_BYTES, 0) <= 0:
            raise OSError(f"expected to read {STATM_PATH}, which failed")
        _, resident, backed, _ = self._buffer.raw.split(b" ", 3)
        page_bytes, shared = self._page_bytes, self._shared_bytes
        backed_bytes = int(backed) * page_bytes  # file-backed and shared
        return int(resident) * page_bytes - backed_bytes, max(0, backed_bytes - shared), shared

    def read_pss(self) -> int | None:
        """Return the proportional set size in bytes, or None where `smaps_rollup` cannot be read."""
        return _read_pss() if self._has_pss else None

    def close(self) -> None:
        """Give the file descriptors back; a second call does nothing."""
        descriptors = (self._status, self._statm)
        self._status = self._statm = -1
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)


class HighWaterReader:
    """Reads `getrusage`: the highest resident set size of the process so far, the one portable figure."""

    __slots__ = ()

    @property
    def measures(self) -> str:
        """What exactly the figures are, in one phrase."""
        return (
            "host: highest resident set size of the process so far (ru_maxrss of getrusage), given as anonymous; "
            "it includes file-backed pages and never falls, so a peak below an earlier one is not seen"
        )

    def read(self) -> tuple[int, int, int]:
        """Return the highest resident set size in bytes, and zeros for what is not kept apart."""
        # Not on every platform: imported only where it is needed.
        import resource

        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # getrusage(2): bytes on macOS, KiB on Linux and the BSDs.
        return (highest if sys.platform == "darwin" else highest * _KIB), 0, 0

    def read_often(self) -> tuple[int, int, int]:
        """Return what `read` returns, which costs little."""
        return self.read()

    def read_pss(self) -> int | None:
        """Return None: there is no proportional set size."""
        return None

    def close(self) -> None:
        """Do nothing: nothing is held."""


def host_reader(*, proportional: bool = True) -> HostReader:
    """Return the best reader that this platform has.

    Args:
        proportional: Whether it reads the proportional set size, where the platform has it.

    Returns:
        A `ProcReader` where the kernel keeps anonymous and file-backed memory apart, else a `HighWaterReader`.

    Raises:
        ConfigurationError: The platform has neither `/proc` nor `getrusage`.
    """
    try:
        reader = ProcReader(proportional=proportional)
        reader.read()
    except OSError:
        pass
    else:
        return reader
    fallback = HighWaterReader()
    try:
        fallback.read()
    except ImportError as error:
        raise ConfigurationError(
            f"memory profile: expected /proc or getrusage, got neither on {sys.platform}. "
            "Run on Linux or macOS; on Windows, run inside WSL."
        ) from error
    return fallback


def _read_pss() -> int | None:
    try:
        descriptor = os.open(ROLLUP_PATH, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = _PSS_FIELD.search(os.read(descriptor, _READ_BYTES))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None if found is None else int(found.group(1)) * _KIB
