"""A directory that appears under its name when everything is in it, and not before.

It is written beside its place, as `.NAME.unfinished`. A directory that it replaces is moved aside to `.NAME.replaced` for the
moment of the renaming and removed afterwards; an export that finds one there and none at the place puts it back. Files get
their headers last: before that no reader takes them for safetensors files.

The unfinished directory has a marker in it, with a text that no other export has: one that finds another text there has lost its
directory, and gives nothing a name. While the export lives, the first rank holds a lock on the marker (`flock`), so that no other
one takes the directory for one that was left behind.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import socket
import threading
from contextlib import suppress
from pathlib import Path

from shardwise.checkpoint import sync
from shardwise.errors import CheckpointError
from shardwise.export.file_plan import FilePlan
from shardwise.materialization.awaited_call import SECONDS_FOR_STARTED_CALLS, Doing

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
        self._overwrite = False
        self._marker: str | None = None
        self._locked: int | None = None
        # A thread that nobody waits for any longer may still begin or finish while another one discards.
        self._guard = threading.Lock()
        self._is_discarded = threading.Event()
        self._is_published = False

    def refuse(self, *, overwrite: bool) -> None:
        """Raise if there is something at the place that may not be replaced; one rank does it, before anything is made.

        Args:
            overwrite: Whether the directory of a model may be replaced.

        Raises:
            CheckpointError: Naming what is there, or the unfinished directory of another export that still lives.
        """
        self._overwrite = overwrite
        try:
            left = self._lock_left()
            if left is not None:
                os.close(left)
            if self._replaced.is_dir() and not self.path.exists():  # an export ended between two renames
                os.replace(self._replaced, self.path)
            self._refuse_existing()
        except OSError as error:
            raise self.failure("looking at the place", error) from error

    def begin(self, marker: str) -> None:
        """Make the unfinished directory; one rank does it.

        Args:
            marker: By which other ranks know that they see the same directory.

        Raises:
            CheckpointError: Nothing can be made there, or another export is at it.
        """
        try:
            left = self._lock_left()
            try:
                for old in (self.unfinished, self._replaced):
                    shutil.rmtree(old, ignore_errors=True)
                self.unfinished.mkdir(parents=True)
                try:
                    locked = self._mark(marker)
                except OSError:
                    shutil.rmtree(self.unfinished, ignore_errors=True)
                    raise
            finally:
                if left is not None:
                    os.close(left)
        except OSError as error:
            raise self.failure("making the directory", error) from error
        with self._guard:
            self._marker, self._locked = marker, locked
            if self._is_discarded.is_set():
                self._remove()

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
        self._require_own()
        try:
            for planned in plan.files:
                doing.begin(f"{self.path}: storing {planned.name}")
                with (self.unfinished / planned.name).open("r+b") as file:
                    file.write(planned.header)
                    file.flush()
                    os.fsync(file.fileno())
            if plan.index_name is not None:
                (self.unfinished / plan.index_name).write_text(plan.index, encoding="utf-8")
            stored = {self.unfinished / planned.name for planned in plan.files}
            for path in self.unfinished.rglob("*"):
                if path not in stored:
                    sync(path)
            sync(self.unfinished)
            with self._guard:
                has_replaced = self._publish()
            sync(self.path.parent)
        except OSError as error:
            raise self.failure("giving the directory its name", error) from error
        if has_replaced:
            shutil.rmtree(self._replaced, ignore_errors=True)

    def discard(self) -> None:
        """Remove what is unfinished, and put back what was to be replaced; after the renames it only gives up the lock.

        A thread that is still in `finish` gives nothing a name afterwards.
        """
        self._is_discarded.set()
        if not self._guard.acquire(timeout=SECONDS_FOR_STARTED_CALLS):
            return  # the renames have begun and hang: old and new are what they need
        try:
            if self._marker is not None:
                self._remove()
        finally:
            self._guard.release()

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

    def _lock_left(self) -> int | None:
        """Lock the unfinished directory that an export has left which lives no more.

        Returns:
            A descriptor that holds the lock until it is closed; None where there is nothing.

        Raises:
            CheckpointError: The export lives.
        """
        path = self.unfinished / _MARKER
        try:
            left = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        # The one that was opened may have got its name, or have been removed, before it was locked.
        if not _lock(left) or not (path.exists() and os.path.samestat(os.fstat(left), path.stat())):
            os.close(left)
            raise self._taken()
        return left

    def _mark(self, marker: str) -> int:
        file = os.open(self.unfinished / _MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            if not _lock(file):
                raise self._taken()
            os.write(file, marker.encode())
        except BaseException:
            os.close(file)
            raise
        return file

    def _require_own(self) -> None:
        if self._marker is None or not self.is_seen(self._marker):
            raise CheckpointError(
                f"{self.path}: expected {self.unfinished} as rank {self._rank} ({socket.gethostname()}) has made it, got "
                f"{'that of another export' if self.unfinished.exists() else 'none'}. Nothing was changed at the place. Export to one "
                "directory once at a time, and leave an unfinished one alone."
            )

    def _publish(self) -> bool:
        """Do the renames, under the guard; return whether there was something to replace."""
        if self._is_discarded.is_set():
            raise CheckpointError(f"{self.path}: the export was given up before the directory got its name")
        self._require_own()
        self._refuse_existing()  # again: something may have come since
        has_replaced = self.path.exists() and any(self.path.iterdir())
        if has_replaced:
            os.replace(self.path, self._replaced)
        elif self.path.exists():
            self.path.rmdir()
        os.replace(self.unfinished, self.path)
        self._is_published = True
        # Not before: a directory without it is one that was left behind.
        with suppress(OSError):
            (self.path / _MARKER).unlink()
        return has_replaced

    def _remove(self) -> None:
        if not self._is_published:
            if self._marker is not None and self.is_seen(self._marker):
                shutil.rmtree(self.unfinished, ignore_errors=True)
            if self._replaced.is_dir() and not self.path.exists():
                os.replace(self._replaced, self.path)
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None

    def _taken(self) -> CheckpointError:
        return CheckpointError(
            f"{self.unfinished}: expected no other export to {self.path} at the same time, got one that holds its lock. Wait until it "
            "has ended, or export to another directory. Nothing was changed there."
        )

    def _refuse_existing(self) -> None:
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise CheckpointError(
                f"{self.path}: expected a directory, or nothing, got {'a link' if self.path.is_symlink() else 'a file'}. Name "
                "another place."
            )
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not self._overwrite:
            raise CheckpointError(
                f"{self.path}: expected a directory that is empty or not there, got one with files. Export to a new one, or pass "
                "overwrite=True (--overwrite) to replace it."
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


def _lock(file: int) -> bool:
    """Lock a file until its descriptor is closed or the process ends; return False if another descriptor has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some file systems have no locks: the marker alone is looked at there.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
