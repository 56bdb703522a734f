"""A directory that appears under its name when everything is in it, and not before.

It is written beside its place, as `.NAME.unfinished`. A directory that it replaces is moved aside to `.NAME.replaced` for the
moment of the renaming and removed afterwards; an export that finds one there and none at the place puts it back. Files get
their headers last: before that no reader takes them for safetensors files.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
from pathlib import Path

from shardwise.checkpoint import sync
from shardwise.errors import CheckpointError
from shardwise.export.file_plan import FilePlan
from shardwise.materialization.awaited_call import Doing

_MARKER = ".shardwise"
_ADAPTER_CONFIG = "adapter_config.json"
_WRITTEN_BY_EXPORTS = ("*.safetensors", "config.json", _ADAPTER_CONFIG, "*.safetensors.index.json")


class OutputDirectory:
    """Where an export goes, as one rank sees it.

    Args:
        path: Absolute; of the directory when it is finished.
        rank: This one, for messages.
    """

    def __init__(self, path: Path, *, rank: int) -> None:
        self.path = path
        self.unfinished = path.parent / f".{path.name}.unfinished"
        self._replaced = path.parent / f".{path.name}.replaced"
        self._rank = rank

    def refuse(self, *, overwrite: bool) -> None:
        """Raise if there is something at the place that may not be replaced; one rank does it, before anything is made.

        Args:
            overwrite: Whether the directory of a model may be replaced.

        Raises:
            CheckpointError: Naming what is there.
        """
        try:
            if self._replaced.is_dir() and not self.path.exists():  # an export ended between two renames
                os.replace(self._replaced, self.path)
            self._refuse_existing(overwrite=overwrite)
        except OSError as error:
            raise self.failure("looking at the place", error) from error

    def begin(self, marker: str) -> None:
        """Make the unfinished directory; one rank does it.

        Args:
            marker: By which other ranks know that they see the same directory.

        Raises:
            CheckpointError: Nothing can be made there.
        """
        try:
            for left in (self.unfinished, self._replaced):
                shutil.rmtree(left, ignore_errors=True)
            self.unfinished.mkdir(parents=True)
            (self.unfinished / _MARKER).write_text(marker, encoding="utf-8")
        except OSError as error:
            raise self.failure("making the directory", error) from error

    def is_seen(self, marker: str) -> bool:
        """Return whether this rank sees the directory that `begin` has made on another one."""
        try:
            return (self.unfinished / _MARKER).read_text(encoding="utf-8") == marker
        except (OSError, UnicodeDecodeError):
            return False

    def create(self, plan: FilePlan, doing: Doing) -> None:
        """Make all files in their sizes, without headers; one rank does it.

        Args:
            plan: Of the files.
            doing: Told which file it is at.

        Raises:
            CheckpointError: There is no room for them.
        """
        for planned in plan.files:
            path = self.unfinished / planned.name
            doing.begin(f"{self.path}: making {planned.name}")
            try:
                path.parent.mkdir(exist_ok=True)
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                try:
                    _allocate(file, planned.nbytes)
                finally:
                    os.close(file)
            except OSError as error:
                what = f"making room for {planned.nbytes:,} bytes in {planned.name} ({plan.nbytes:,} in all files)"
                raise self.failure(what, error) from error

    def finish(self, plan: FilePlan, doing: Doing) -> None:
        """Write the headers and the index, and give the directory its name; one rank does it, when the others have synced.

        Args:
            plan: Of the files.
            doing: Told which file it is at.

        Raises:
            CheckpointError: That is not possible.
        """
        try:
            for planned in plan.files:
                doing.begin(f"{self.path}: storing {planned.name}")
                with (self.unfinished / planned.name).open("r+b") as file:
                    file.write(planned.header)
                    file.flush()
                    os.fsync(file.fileno())
            if plan.index_name is not None:
                (self.unfinished / plan.index_name).write_text(plan.index, encoding="utf-8")
            (self.unfinished / _MARKER).unlink()
            stored = {self.unfinished / planned.name for planned in plan.files}
            for path in self.unfinished.rglob("*"):
                if path not in stored:
                    sync(path)
            sync(self.unfinished)
            if self.path.exists():
                if any(self.path.iterdir()):
                    os.replace(self.path, self._replaced)
                else:
                    self.path.rmdir()
            os.replace(self.unfinished, self.path)
            sync(self.path.parent)
        except OSError as error:
            raise self.failure("giving the directory its name", error) from error
        shutil.rmtree(self._replaced, ignore_errors=True)

    def discard(self) -> None:
        """Remove what is unfinished, and put back what was to be replaced."""
        shutil.rmtree(self.unfinished, ignore_errors=True)
        if self._replaced.is_dir() and not self.path.exists():
            os.replace(self._replaced, self.path)

    def failure(self, what: str, error: OSError) -> CheckpointError:
        """Return the error to raise where the system refuses something."""
        remedies = {
            errno.ENOSPC: "Free space, or choose a directory on another file system.",
            errno.EDQUOT: "The quota is used up: free space, or choose a directory on another file system.",
            errno.EACCES: "Choose a directory that every rank's user may write to.",
            errno.EPERM: "Choose a directory that every rank's user may write to.",
            errno.EROFS: "Choose a directory that every rank's user may write to.",
        }
        remedy = remedies.get(error.errno or 0, "Check the disk or the mount.")
        return CheckpointError(
            f"{self.path}: {what} failed on rank {self._rank} ({socket.gethostname()}): {error.strerror or error}. {remedy} Nothing "
            "was changed there."
        )

    def _refuse_existing(self, *, overwrite: bool) -> None:
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise CheckpointError(
                f"{self.path}: expected a directory, or nothing, got {'a link' if self.path.is_symlink() else 'a file'}. Name "
                "another place."
            )
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not overwrite:
            raise CheckpointError(
                f"{self.path}: expected a directory that is empty or not there, got one with files. Export to a new one, or pass "
                "overwrite=True to replace it."
            )
        inside = sorted(
            path.name
            for path in self.path.iterdir()
            if path.is_dir() and not (path / _ADAPTER_CONFIG).is_file()
        )
        is_model = any(True for pattern in _WRITTEN_BY_EXPORTS for _ in self.path.glob(pattern))
        if inside or not is_model:
            got = (
                f"one with directories in it ({', '.join(inside)})" if inside else "one without a model in it"
            )
            raise CheckpointError(
                f"{self.path}: expected the directory of a model to replace, got {got}. overwrite=True removes all that is there: "
                "remove it yourself, or name another place."
            )


def _allocate(file: int, nbytes: int) -> None:
    """Give a file its size, and its blocks too where the file system can do that at once.

    `os.posix_fallocate` falls back to writing into every block, which takes as long as the export on a network mount.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is not None:
        arguments = (ctypes.c_int(file), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(nbytes))
        while fallocate(*arguments) != 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                continue
            if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                break
            raise OSError(number, os.strerror(number))
        else:
            return
    os.ftruncate(file, nbytes)
