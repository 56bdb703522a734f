"""The file that a memory profile is saved to, one per rank."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Final

import torch.distributed as dist

from shardwise.profiling.node import own_node
from shardwise.profiling.whole_file import write_whole

PROFILE_SCHEMA: Final = "shardwise.memory_profile/1"


def save_document(document: Mapping[str, Any], path: str | os.PathLike[str], *, rank: int | None) -> None:
    """Write a profile's JSON form with its schema, rank and node, whole or not at all.

    Args:
        document: What `MemoryProfile.to_json` returned.
        path: File to write; missing directories are made.
        rank: The rank; None for this process's own.
    """
    own = {"schema": PROFILE_SCHEMA, "rank": _own_rank() if rank is None else rank, "node": own_node()}
    write_whole(path, json.dumps({**own, **document}, allow_nan=False) + "\n")


def _own_rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    given = os.environ.get("RANK", "")
    return int(given) if given.isascii() and given.isdecimal() else 0
