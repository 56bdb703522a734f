"""What can be found wrong with a command's arguments on this machine, before ranks are started for it."""

from __future__ import annotations

import os
from pathlib import Path


def check_checkpoint(name: str) -> None:
    """Raise what ranks would raise of a path without a checkpoint.

    A rank of a launcher passes: others may see what it does not, and they agree on that. Of a hub id only the spelling is looked at.

    Args:
        name: Directory, file or hub id.

    Raises:
        CheckpointError: There is no such path and the name cannot be a hub id; or it has no safetensors files.
    """
    from shardwise.checkpoint import locate, require_files
    from shardwise.compare.launch import is_rank

    if not is_rank(os.environ):
        path = locate(name).path
        if path is not None:
            require_files(path)


def check_data(path: Path) -> None:
    """Raise what ranks would raise of a file of training data, if it cannot be read or its first record is none.

    Raises:
        DataError: Naming the file.
    """
    from shardwise.compare.launch import is_rank
    from shardwise.training.records import read_records

    if not is_rank(os.environ):
        next(read_records(path), None)
