"""Open files that somebody else put there: regular ones only, and without waiting for what is none."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from shardwise.errors import CheckpointError, DamagedFileError

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}
_PIECE_BYTES = 2**16


_REMEDIES = {
    errno.ENOMEM: "The machine has no memory left for it: run fewer ranks on this node, or pass smaller staging_bytes.",
    errno.ENOSPC: "The file system is full: make room on it.",
    errno.EMFILE: "This process has too many open files: raise the limit (ulimit -n).",
    errno.ENFILE: "The machine has too many open files: raise its limit.",
    errno.ESTALE: "The file was replaced on its server: load again.",
}


def open_regular(path: Path, *, flags: int) -> int:
    """Open a file for reading and return its descriptor.

    Args:
        path: Of the file.
        flags: In addition, for example `os.O_DIRECT`.

    Raises:
        CheckpointError: It is not a regular file: reading from a FIFO or a device would wait for ever.
        OSError: It cannot be opened.
    """
    _require_regular(path, path.stat())  # opening a device can have effects of its own
    # Whatever was put in its place since: opening a FIFO without O_NONBLOCK waits for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    try:
        _require_regular(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def require_regular(path: Path) -> None:
    """Raise unless there is a regular file, for readers that open it themselves.

    Raises:
        CheckpointError: It is of another kind.
        OSError: There is none.
    """
    _require_regular(path, path.stat())


def read_text(path: Path, *, most_bytes: int, what: str) -> str:
    """Return a small text file.

    Args:
        path: Of the file.
        most_bytes: That it may have.
        what: It is, for messages.

    Raises:
        DamagedFileError: It is larger, or not UTF-8.
        CheckpointError: It is not a regular file, or cannot be read.
    """
    try:
        with os.fdopen(open_regular(path, flags=0), "rb") as file:
            content = bytearray()
            # A file may have another size than the system says, which is 0 on some; and all that is asked for is allocated at once.
            while len(content) <= most_bytes:
                piece = file.read(min(_PIECE_BYTES, most_bytes + 1 - len(content)))
                if not piece:
                    break
                content += piece
    except OSError as error:
        raise unreadable(path, error, what="reading it") from error
    if len(content) > most_bytes:
        raise DamagedFileError(
            f"{path}: expected {what} of at most {most_bytes:,} bytes, got more. Get the file again."
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFileError(
            f"{path}: expected {what} in UTF-8, got {error}. Get the file again."
        ) from error


def unreadable(path: Path, error: OSError, *, what: str) -> CheckpointError:
    """Return the error for a file that the system does not give."""
    code = errno.errorcode.get(error.errno or 0, "error")
    remedy = _REMEDIES.get(error.errno or 0, "Check its permissions, the disk and the mount.")
    return CheckpointError(f"{path}: {what} failed: {code} ({error.strerror}). {remedy}")


def _require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "another kind of file")
        raise CheckpointError(
            f"{path}: expected a regular file, got {kind}. Put the file itself in its place; do not use this checkpoint "
            "unless you know where it is from."
        )
