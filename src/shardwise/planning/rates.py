"""Seconds from bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shardwise.errors import CheckpointError, ConfigurationError

_CHUNK_BYTES = 8 << 20
_MEASURED_BYTES = 1 << 30
_MEASURED_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast bytes move; None where nobody said.

    Args:
        read_bytes_per_second: From storage to one node.
        link_bytes_per_second: That one rank receives, or sends.
    """

    read_bytes_per_second: float | None
    link_bytes_per_second: float | None

    def __post_init__(self) -> None:
        for name in ("read_bytes_per_second", "link_bytes_per_second"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigurationError(f"{name}: expected a number above 0, got {value}.")

    def seconds(self, *, read_bytes: int, moved_bytes: int, at_once: bool) -> float | None:
        """Return how long reading and moving take; None where a rate that it depends on is not known.

        Start-up, casts, copies to devices and waiting are not among it.

        Args:
            read_bytes: Of the node that reads the most.
            moved_bytes: Of the rank that receives or sends the most.
            at_once: Whether bytes move while others are read.
        """
        parts = []
        for nbytes, rate in (
            (read_bytes, self.read_bytes_per_second),
            (moved_bytes, self.link_bytes_per_second),
        ):
            if nbytes and rate is None:
                return None
            parts.append(nbytes / rate if nbytes and rate is not None else 0.0)
        return max(parts) if at_once else sum(parts)


def measured_read_rate(files: Sequence[Path]) -> float:
    """Return the bytes per second of one thread that reads files in a row, as far as the system lets go of what it has of them.

    At most 1 GiB is read, and for at most 5 s.

    Args:
        files: Of a checkpoint.

    Raises:
        CheckpointError: There is nothing to read, or it cannot be read.
    """
    done, started = 0, time.perf_counter()
    try:
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                with suppress(AttributeError, OSError):  # not on every system
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                while chunk := os.read(descriptor, _CHUNK_BYTES):
                    done += len(chunk)
                    if done >= _MEASURED_BYTES or time.perf_counter() - started > _MEASURED_SECONDS:
                        return done / (time.perf_counter() - started)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected to read it, got {error}. Give --read-gbps instead."
        ) from error
    if not done:
        raise CheckpointError(
            "measuring the read rate: expected files of the checkpoint on this machine, got none. Give --read-gbps instead."
        )
    return done / (time.perf_counter() - started)
