"""The files of an export, open for writing on this rank."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from shardwise.export.directory import OutputDirectory
from shardwise.materialization.awaited_call import Doing

_MOST_PARTS = 512  # of one call; systems take at least 1024


class OutputFiles:
    """Writes bytes at their places; may be called from several threads.

    Args:
        directory: Begun, with the files in it.
    """

    def __init__(self, directory: OutputDirectory) -> None:
        self._directory = directory
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()
        self.written_bytes = 0

    def write(self, file: str, offset: int, parts: Sequence[memoryview]) -> None:
        """Write buffers one after the other.

        Args:
            file: Name within the directory.
            offset: Of the first byte.
            parts: Of bytes.

        Raises:
            CheckpointError: The system refuses it; the message names file, rank and host.
        """
        total = sum(map(len, parts))
        try:
            descriptor = self._descriptor(file)
            at = offset
            for first in range(0, len(parts), _MOST_PARTS):
                at = _write_all(descriptor, at, list(parts[first : first + _MOST_PARTS]))
        except OSError as error:
            what = f"writing {total:,} bytes at byte {offset:,} of {file}"
            raise self._directory.failure(what, error) from error
        with self._lock:
            self.written_bytes += total

    def open(self, file: str) -> None:
        """Open a file now, so that what forbids it is known before anything is written."""
        try:
            self._descriptor(file)
        except OSError as error:
            raise self._directory.failure(f"opening {file}", error) from error

    def sync(self, doing: Doing) -> None:
        """Wait until what this rank has written is on storage.

        Args:
            doing: Told which file it is at.
        """
        for file, descriptor in self._open.items():
            doing.begin(f"{self._directory.path}: storing {file}")
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise self._directory.failure(f"storing {file}", error) from error

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._open:
                # For writing alone: a network file system may then never write a neighbour's bytes from its page cache.
                self._open[file] = os.open(
                    self._directory.unfinished / file, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
                )
            return self._open[file]


def _write_all(descriptor: int, offset: int, parts: list[memoryview]) -> int:
    """Write all parts, and return the offset after the last byte."""
    while parts:
        done = os.pwritev(descriptor, parts, offset)
        offset += done
        while parts and done >= len(parts[0]):
            done -= len(parts.pop(0))
        if done:
            parts[0] = parts[0][done:]
    return offset
