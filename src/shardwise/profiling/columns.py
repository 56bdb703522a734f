"""The readings of one profile, kept by column so that the profile itself stays small."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import ConfigurationError
from shardwise.profiling.readings import MemoryReading

FIELDS: Final = (
    "anon_bytes",
    "file_bytes",
    "shared_bytes",
    "pss_bytes",
    "device_allocated_bytes",
    "device_reserved_bytes",
    "device_peak_bytes",
    "fetched_bytes",
    "read_bytes",
    "received_bytes",
)
_WIDTH: Final = 1 + len(FIELDS)  # the instant in seconds, then the fields
ROW_BYTES: Final = 8 * _WIDTH
NOT_READ: Final = math.nan

Row = tuple[float, ...]  # of _WIDTH


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPeaks:
    """Highest increases over the baseline, never negative.

    Args:
        anon_peak_bytes: Of anonymous memory.
        file_peak_bytes: Of file-backed memory.
        shared_peak_bytes: Of shared memory.
        pss_peak_bytes: Of the proportional set size; None where it was not read. It is read less often than
            the others, and so is a lower bound.
        device_peak_bytes: Of device memory in live tensors; 0 where there is no device.
        device_reserved_peak_bytes: Of what the device's allocator holds, at the readings; 0 where there is no device.
    """

    anon_peak_bytes: int
    file_peak_bytes: int
    shared_peak_bytes: int
    pss_peak_bytes: int | None
    device_peak_bytes: int
    device_reserved_peak_bytes: int


class ReadingColumns:
    """Readings in the order of time, in one flat array of float64 (exact for byte counts below 2**53).

    When full, neighbours are merged in pairs, each field to its higher value: peaks are kept, and only the
    resolution in time is halved.

    Args:
        most_rows: Number of rows at which neighbours are merged.
    """

    __slots__ = ("_most_values", "_values")

    def __init__(self, *, most_rows: int) -> None:
        self._most_values = most_rows * _WIDTH
        self._values = array("d")

    def __len__(self) -> int:
        return len(self._values) // _WIDTH

    def append(self, row: Row) -> bool:
        """Add a reading at the end.

        Args:
            row: Seconds since the profile's start, then the fields, `NOT_READ` where there is none.

        Returns:
            Whether neighbours were merged to make room; the caller may then read half as often.
        """
        merged = len(self._values) >= self._most_values
        if merged:
            self._merge_pairs()
        self._values.extend(row)
        return merged

    def rows(self) -> Iterator[MemoryReading]:
        """Yield the readings, the oldest first."""
        for row in self._table().tolist():
            yield reading_of(row)

    def seconds(self) -> NDArray[np.float64]:
        """Return the instants of the readings, since the profile's start."""
        return self._table()[:, 0]

    def values(self, name: str) -> NDArray[np.float64]:
        """Return one field in bytes, NaN where it was not read."""
        return self._table()[:, 1 + FIELDS.index(name)]

    def device_values(self) -> NDArray[np.float64]:
        """Return device bytes in live tensors, with peaks between the readings, NaN where not read.

        The allocator's own highest value shows what came and went between two readings: where it has changed
        since the reading before, it is the truth about the time between them.
        """
        allocated = self.values("device_allocated_bytes")
        was_read = np.flatnonzero(~np.isnan(allocated))
        if was_read.size == 0:
            return allocated
        highest = self.values("device_peak_bytes")[was_read]
        changed = np.diff(highest, prepend=highest[0]) != 0
        allocated[was_read[changed]] = np.maximum(allocated[was_read], highest)[changed]
        return allocated

    def _table(self) -> NDArray[np.float64]:
        # A copy: a view would forbid the array to grow while it lives.
        return np.array(self._values, dtype=np.float64).reshape(-1, _WIDTH)

    def _merge_pairs(self) -> None:
        table = self._table()
        rows = len(table) // 2 * 2
        # The later instant, the highest of a column, stands for both: what it says holds since the row before.
        pairs = np.fmax(table[0:rows:2], table[1:rows:2])
        self._values = array("d", pairs.tobytes() + table[rows:].tobytes())


def reading_of(row: Sequence[float]) -> MemoryReading:
    """Return a row under its field names."""
    seconds, *values = row
    anon, file, shared, *others = (None if math.isnan(value) else int(value) for value in values)
    pss, allocated, reserved, peak, fetched, read, received = others
    return MemoryReading(
        seconds=seconds,
        anon_bytes=anon or 0,
        file_bytes=file or 0,
        shared_bytes=shared or 0,
        pss_bytes=pss,
        device_allocated_bytes=allocated,
        device_reserved_bytes=reserved,
        device_peak_bytes=peak,
        fetched_bytes=fetched,
        read_bytes=read,
        received_bytes=received,
    )


def span_peaks(
    columns: ReadingColumns, *, baseline: MemoryReading, start_seconds: float, stop_seconds: float
) -> MemoryPeaks:
    """Return the highest increases within `[start_seconds, stop_seconds]`, both ends included.

    Args:
        columns: Readings of one profile.
        baseline: What increases are counted from.
        start_seconds: Start of the span, since the profile's start.
        stop_seconds: End of the span, since the profile's start.

    Returns:
        The peaks; where the span has no reading of its own, the last reading before it counts.

    Raises:
        ConfigurationError: The span ends before it starts.
    """
    if not start_seconds <= stop_seconds:
        raise ConfigurationError(
            f"memory profile: expected a span that ends after its start, got {start_seconds} s to "
            f"{stop_seconds} s"
        )
    seconds = columns.seconds()

    def increase(values: NDArray[np.float64], base: int | None) -> int | None:
        was_read = ~np.isnan(values)
        inside = values[was_read & (seconds >= start_seconds) & (seconds <= stop_seconds)]
        if inside.size == 0:
            inside = values[was_read & (seconds < start_seconds)][-1:]
        if inside.size == 0 or base is None:
            return None
        return max(0, int(inside.max()) - base)

    return MemoryPeaks(
        anon_peak_bytes=increase(columns.values("anon_bytes"), baseline.anon_bytes) or 0,
        file_peak_bytes=increase(columns.values("file_bytes"), baseline.file_bytes) or 0,
        shared_peak_bytes=increase(columns.values("shared_bytes"), baseline.shared_bytes) or 0,
        pss_peak_bytes=increase(columns.values("pss_bytes"), baseline.pss_bytes),
        device_peak_bytes=increase(columns.device_values(), baseline.device_allocated_bytes) or 0,
        device_reserved_peak_bytes=increase(
            columns.values("device_reserved_bytes"), baseline.device_reserved_bytes
        )
        or 0,
    )
