"""Reads that a failed load has left behind: they write into shards whenever the system answers, maybe long after a second load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from shardwise.errors import StalledReadError


@dataclass(frozen=True, slots=True, kw_only=True)
class _LeftBehind:
    """A read that has not returned; its thread keeps the memory, so that nothing else gets these addresses.

    Args:
        future: Of the read.
        what: It is, with the file.
        places: Addresses that it writes to.
    """

    future: Future[Any]
    what: str
    places: tuple[range, ...]


_left: list[_LeftBehind] = []


def leave_behind(future: Future[Any], what: str, parts: Sequence[memoryview]) -> None:
    """Remember a read into shards of a load that has failed, unless it has ended.

    Args:
        future: Of the read.
        what: It is, with the file.
        parts: Of shards, that it writes to.
    """
    if not future.done():
        starts = (torch.frombuffer(part, dtype=torch.uint8).data_ptr() for part in parts if len(part))
        places = tuple(
            range(start, start + len(part)) for start, part in zip(starts, filter(len, parts), strict=True)
        )
        _left.append(_LeftBehind(future=future, what=what, places=places))


def refuse_left_behind(targets: Mapping[str, torch.Tensor]) -> None:
    """Raise where a read of an earlier load may still write into a shard: it would overwrite what the shard holds by then.

    Args:
        targets: This rank's shards by fqn.

    Raises:
        StalledReadError: Naming the shard and the read.
    """
    _left[:] = [each for each in _left if not each.future.done()]
    if not _left:
        return
    for fqn, shard in targets.items():
        if shard.device.type != "cpu":
            continue
        start = shard.untyped_storage().data_ptr()
        stop = start + shard.untyped_storage().nbytes()
        for each in _left:
            if any(place.start < stop and start < place.stop for place in each.places):
                raise StalledReadError(
                    f"{fqn}: expected memory that nothing else writes into, got that of an earlier load whose read has not returned: "
                    f"{each.what}. It would overwrite the values whenever it returns. Build the model anew and load into that."
                )
