"""What came from storage and over the network: counters of the kernel, read beside the memory.

They only grow, so that a difference between two readings is exact however few readings lie between.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from shardwise.profiling.columns import NOT_READ, ReadingColumns

IO_PATH: Final = "/proc/self/io"
NETWORK_PATH: Final = "/proc/self/net/dev"

_READ_BYTES: Final = 65536  # a machine with hundreds of interfaces has a long list
_IO_FIELDS: Final = re.compile(rb"^rchar: (\d+)$.*^read_bytes: (\d+)$", re.MULTILINE | re.DOTALL)
_RECEIVED: Final = re.compile(rb"^\s*[^\s:]+:\s*(\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What came in during a span, in bytes; None where it cannot be read.

    Args:
        fetched_bytes: What the kernel fetched from storage for this process, page faults of mapped files included;
            what the page cache holds is not fetched.
        read_bytes: What this process's read calls returned: of files, pipes, and sockets that are read that way.
        received_bytes: What the network interfaces of this machine received, for all its processes, loopback
            included; what an accelerator's own links carry is not in it.
    """

    fetched_bytes: int | None
    read_bytes: int | None
    received_bytes: int | None


class TrafficReader:
    """Reads the counters of Linux's `/proc`; elsewhere there are none.

    Source:
        `Documentation/filesystems/proc.rst` of the Linux kernel: `io` and `net/dev`.
    """

    __slots__ = ("_io", "_network")

    def __init__(self) -> None:
        self._io = _opened(IO_PATH)
        self._network = _opened(NETWORK_PATH)

    def __del__(self) -> None:
        self.close()

    @property
    def measures(self) -> str:
        """What exactly the figures are, in one phrase; "" where nothing is read."""
        parts = []
        if self._io is not None:
            parts.append(f"fetched and read: read_bytes and rchar of {IO_PATH}")
        if self._network is not None:
            parts.append(f"received: by all interfaces in {NETWORK_PATH}, for all processes of the machine")
        return "; ".join(parts)

    def read(self) -> tuple[float, float, float]:
        """Return bytes fetched, read and received so far, `NOT_READ` where there is no such figure."""
        fetched = read = received = NOT_READ
        found = _IO_FIELDS.search(_content(self._io))
        if found is not None:
            read, fetched = (float(figure) for figure in found.groups())
        counts = _RECEIVED.findall(_content(self._network))
        if counts:
            received = float(sum(map(int, counts)))
        return fetched, read, received

    def close(self) -> None:
        """Give the file descriptors back; a second call does nothing."""
        for name in ("_io", "_network"):
            descriptor = getattr(self, name, None)
            setattr(self, name, None)
            if descriptor is not None:
                os.close(descriptor)


def span_traffic(columns: ReadingColumns, *, start_seconds: float, stop_seconds: float) -> Traffic:
    """Return what came in within a span, from the last reading before each of its ends.

    Args:
        columns: Readings of one profile.
        start_seconds: Start of the span, since the profile's start.
        stop_seconds: End of the span, since the profile's start.
    """
    seconds = columns.seconds()

    def grown(name: str) -> int | None:
        values = columns.values(name)
        was_read = np.flatnonzero(~np.isnan(values))
        if was_read.size == 0:
            return None
        before = np.searchsorted(seconds[was_read], (start_seconds, stop_seconds), side="right") - 1
        first, last = values[was_read[np.maximum(before, 0)]].tolist()
        return int(last - first)

    return Traffic(
        fetched_bytes=grown("fetched_bytes"),
        read_bytes=grown("read_bytes"),
        received_bytes=grown("received_bytes"),
    )


def _opened(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _content(descriptor: int | None) -> bytes:
    if descriptor is None:
        return b""
    try:
        return os.pread(descriptor, _READ_BYTES, 0)
    except OSError:
        return b""
