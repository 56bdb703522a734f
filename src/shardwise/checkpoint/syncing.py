"""What is written reaches the disk before something that depends on it is done."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Store a file's contents, or a directory's names, on the disk.

    Raises:
        OSError: That failed; not where the file system has no such call for directories.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(file)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, also after the machine has failed."""
    unfinished = path.parent / f".{path.name}.unfinished"
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    sync(path.parent)
