"""One open file: ranges of it into memory, or its pages, and whether it is still the same file."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardwise.checkpoint.page_cache import are_cached
from shardwise.checkpoint.regular_file import open_regular, unreadable
from shardwise.errors import ChangedFileError

# Python 3.11 has no name for it: Linux's number, on x86 and ARM. Elsewhere pages are reserved, as by default.
NORESERVE: Final[int] = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""For `mmap`: private pages of a file that is larger than memory can be mapped too; what is written is counted then."""
_PAGE_BYTES = mmap.PAGESIZE
_BYTES_LOOKED_AT = 3
_MOST_PARTS = 512
"""Buffers that one call fills; POSIX systems take 1,024."""
_TRANSIENT = frozenset({errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.EBUSY})
"""Errors that a network file system reports of a fault that may be over in a moment."""
_PAUSES_SECONDS = (0.05, 0.2, 0.8)
"""Before each further try; EINTR needs none, Python itself repeats the call."""


class BounceBuffers:
    """Aligned memory that reads past the page cache go through: one buffer for each thread, whatever file it reads.

    A thread's buffer goes when the thread ends, or with this object.

    Args:
        nbytes: Of a buffer; a multiple of the page size.
    """

    def __init__(self, *, nbytes: int) -> None:
        self.nbytes = nbytes
        self._of_thread = threading.local()

    def own(self) -> memoryview:
        """Return this thread's buffer."""
        buffer: mmap.mmap | None = getattr(self._of_thread, "buffer", None)
        if buffer is None:
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared pages are in no count of this process
            buffer = self._of_thread.buffer = mmap.mmap(-1, self.nbytes, flags=private)
        return memoryview(buffer)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """What changes when a file does."""

    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """Return the identity that a stat call found."""
        return cls(
            size=status.st_size, mtime_ns=status.st_mtime_ns, inode=status.st_ino, device=status.st_dev
        )


class RangedFile:
    """A file opened for reading; reads may come from several threads.

    Args:
        path: Of the file.
        bounce: Buffers to read past the page cache through, where the file system can, what is not in it yet; None reads through the
            page cache.

    Raises:
        CheckpointError: It cannot be opened, or is not a regular file.
    """

    def __init__(self, path: Path, *, bounce: BounceBuffers | None) -> None:
        self.path = path
        try:
            self._fd = open_regular(path, flags=0)
        except OSError as error:
            raise unreadable(path, error, what="opening it") from error
        self.identity = FileIdentity.of(os.fstat(self._fd))
        self._bounce = bounce
        self._direct_fd = self._open_direct() if bounce is not None else None
        self._direct_refused = False
        self.retries = 0
        self._lock = threading.Lock()

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill a buffer from an offset on. What fails in a way that may be over in a moment is tried again, and counted.

        Raises:
            ChangedFileError: The file ends before.
            CheckpointError: The system reports an error, and goes on doing so.
        """
        self.read_scattered(offset, [into])

    def read_scattered(self, offset: int, parts: Sequence[memoryview]) -> None:
        """Fill buffers with the bytes that follow each other in the file from an offset on, in one call of the system if it can.

        Raises:
            As `read_into`.
        """
        wanted = sum(map(len, parts))
        position = 0
        left = [part for part in parts if len(part)]
        while left:
            got = self._read_some(offset + position, left)
            if got == 0:
                raise ChangedFileError(
                    f"{self.path}: expected {wanted} bytes at byte {offset}, got {position}: the file has become shorter since "
                    f"its header was read ({self.identity.size:,} bytes then). Do not replace files while they are loaded."
                )
            position += got
            while left and got >= len(left[0]):
                got -= len(left.pop(0))
            if got:
                left[0] = left[0][got:]

    def _read_some(self, offset: int, parts: list[memoryview]) -> int:
        pauses = iter(_PAUSES_SECONDS)
        while True:
            try:
                got = self._read_direct(offset, parts[0])
                return os.preadv(self._fd, parts[:_MOST_PARTS], offset) if got is None else got
            except OSError as error:
                pause = next(pauses, None) if error.errno in _TRANSIENT else None
                if pause is None:
                    raise unreadable(self.path, error, what=f"reading at byte {offset}") from error
                with self._lock:
                    self.retries += 1
                time.sleep(pause)

    def fileno(self) -> int:
        """Return the descriptor; closed with this object."""
        return self._fd

    def map(self) -> mmap.mmap | None:
        """Return the file's pages, private to this mapping: what is written is seen neither in the file nor in another one.

        Returns:
            The mapping; None where the file system cannot, or the file is empty.
        """
        flags = mmap.MAP_PRIVATE | NORESERVE
        try:
            return mmap.mmap(self._fd, self.identity.size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError):
            return None

    def require_unchanged(self) -> None:
        """Raise unless the file is what it was when it was opened, and still the one at its path.

        Raises:
            ChangedFileError: Naming what differs.
        """
        for what, status in (
            ("the open file", os.fstat(self._fd)),
            ("the file at its path", _stat(self.path)),
        ):
            found = FileIdentity.of(status) if status is not None else None
            if found != self.identity:
                raise ChangedFileError(
                    f"{self.path}: expected {what} to stay as it was during the load ({self.identity}), got {found}. The "
                    "values that were read may be mixed: load again, and do not replace files meanwhile."
                )

    def close(self) -> None:
        """Close the file. Mapped pages stay usable; Python keeps one descriptor for each mapping."""
        with self._lock:
            fds = (self._fd, self._direct_fd)
            self._fd, self._direct_fd = -1, None
        for fd in fds:
            if fd is not None and fd >= 0:
                os.close(fd)

    def _open_direct(self) -> int | None:
        if not hasattr(os, "O_DIRECT"):
            return None
        try:
            fd = open_regular(self.path, flags=os.O_DIRECT)
        except OSError:  # some file systems have no way around the page cache
            return None
        if FileIdentity.of(os.fstat(fd)) != self.identity:
            os.close(fd)  # replaced between the two: require_unchanged says so
            return None
        return fd

    def _is_cached(self, offset: int, nbytes: int) -> bool:
        """Return whether a range is in the page cache already, by three of its bytes: others at each load, see `are_cached`."""
        return are_cached(self._fd, (offset + secrets.randbelow(nbytes) for _ in range(_BYTES_LOOKED_AT)))

    def _read_direct(self, offset: int, into: memoryview) -> int | None:
        """Read through an aligned buffer of this thread; None where the file system refuses, or gives nothing that is of use."""
        fd = self._direct_fd
        if fd is None or self._bounce is None or self._direct_refused or self._is_cached(offset, len(into)):
            return None
        bounce = self._bounce.own()
        start = offset // _PAGE_BYTES * _PAGE_BYTES
        wanted = min(offset - start + len(into), len(bounce))
        length = -(-wanted // _PAGE_BYTES) * _PAGE_BYTES
        try:
            got = os.preadv(fd, [bounce[:length]], start)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
            # Closed with the file: another thread may be reading from it right now.
            self._direct_refused = True
            return None
        usable = max(0, min(got, wanted) - (offset - start))
        into[:usable] = bounce[offset - start : offset - start + usable]
        # Nothing that is of use is not the end of the file: a short read may end before the offset, which lies within a page.
        return usable or None


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
