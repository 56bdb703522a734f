"""The files of an export, open for writing on this rank."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
        self._use_lock = threading.Lock()  # never held during a call of the system
        self._users = 0
        self._is_closed = threading.Event()
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
            with self._kept_open():
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
        for file, descriptor in list(self._open.items()):
            doing.begin(f"{self._directory.path}: storing {file}")
            try:
                with self._kept_open():
                    os.fsync(descriptor)
            except OSError as error:
                raise self._directory.failure(f"storing {file}", error) from error

    def close(self) -> None:
        """Close all files; where a thread that nobody waits for any longer still uses one, the thread closes them when it is done."""
        with self._use_lock:
            self._is_closed.set()
            is_used = self._users > 0
        if not is_used:
            self._close_all()

    @contextmanager
    def _kept_open(self) -> Iterator[None]:
        """Keep the files open in the body: a descriptor that was closed may be that of another file by the next write."""
        with self._use_lock:
            if self._is_closed.is_set():
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._users += 1
        try:
            yield
        finally:
            with self._use_lock:
                self._users -= 1
                is_last = self._is_closed.is_set() and not self._users
            if is_last:
                self._close_all()

    def _close_all(self) -> None:
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
