"""One open file: ranges of it into memory, or its pages, and whether it is still the same file."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from shardwise.errors import ChangedFileError, CheckpointError

_PAGE_BYTES = mmap.PAGESIZE
_BOUNCE_BYTES = 4 * 2**20


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
        direct_io: Read past the page cache where the file system can; large checkpoints then leave the cache to others.

    Raises:
        CheckpointError: It cannot be opened.
    """

    def __init__(self, path: Path, *, direct_io: bool) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(path, error, what="opening it") from error
        self.identity = FileIdentity.of(os.fstat(self._fd))
        self._direct_fd = self._open_direct() if direct_io else None
        self._bounce = threading.local()
        self._mapping: mmap.mmap | None = None
        self._lock = threading.Lock()

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill a buffer from an offset on.

        Raises:
            ChangedFileError: The file ends before.
            CheckpointError: The system reports an error.
        """
        position = 0
        while position < len(into):
            part = into[position:]
            try:
                got = self._read_direct(offset + position, part)
                if got is None:
                    got = os.preadv(self._fd, [part], offset + position)
            except OSError as error:
                raise _unreadable(self.path, error, what=f"reading at byte {offset + position}") from error
            if got == 0:
                raise ChangedFileError(
                    f"{self.path}: expected {len(into)} bytes at byte {offset}, got {position}: the file has become shorter since "
                    f"its header was read ({self.identity.size:,} bytes then). Do not replace files while they are loaded."
                )
            position += got

    def mapped(self, offset: int, *, dtype: torch.dtype, numel: int) -> torch.Tensor | None:
        """Return private pages of the file as a flat tensor, or None where elements do not lie on their boundary."""
        if numel == 0 or offset % dtype.itemsize or offset + numel * dtype.itemsize > self.identity.size:
            return None
        with self._lock:
            if self._mapping is None:
                # Without a reservation a checkpoint larger than memory can be mapped too; what is written is counted then.
                flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
                try:
                    self._mapping = mmap.mmap(
                        self._fd, self.identity.size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE
                    )
                except (OSError, ValueError):
                    return None
        return torch.frombuffer(self._mapping, dtype=dtype, count=numel, offset=offset)

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
        """Close the file; mapped tensors stay usable, and Python keeps one descriptor for them."""
        for name in ("_fd", "_direct_fd"):
            fd = getattr(self, name)
            if fd is not None and fd >= 0:
                setattr(self, name, -1 if name == "_fd" else None)
                os.close(fd)
        self._mapping = None

    def _open_direct(self) -> int | None:
        if not hasattr(os, "O_DIRECT"):
            return None
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:  # some file systems have no way around the page cache
            return None

    def _read_direct(self, offset: int, into: memoryview) -> int | None:
        """Read through an aligned buffer of this thread; None where the file system refuses."""
        fd = self._direct_fd
        if fd is None:
            return None
        bounce = getattr(self._bounce, "buffer", None)
        if bounce is None:
            bounce = self._bounce.buffer = mmap.mmap(-1, _BOUNCE_BYTES)
        start = offset // _PAGE_BYTES * _PAGE_BYTES
        wanted = min(offset - start + len(into), _BOUNCE_BYTES)
        length = -(-wanted // _PAGE_BYTES) * _PAGE_BYTES
        try:
            got = os.preadv(fd, [memoryview(bounce)[:length]], start)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
            self._direct_fd = None
            os.close(fd)
            return None
        usable = max(0, min(got, wanted) - (offset - start))
        into[:usable] = memoryview(bounce)[offset - start : offset - start + usable]
        return usable


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _unreadable(path: Path, error: OSError, *, what: str) -> CheckpointError:
    code = errno.errorcode.get(error.errno or 0, "error")
    return CheckpointError(
        f"{path}: {what} failed: {code} ({error.strerror}). Check its permissions, the disk and the mount."
    )
