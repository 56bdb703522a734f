"""Which rank failed first, and what it said."""

from __future__ import annotations

import json
import signal
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_TAIL_LINES: Final = 12
_KILLED, _SAID, _LEFT, _CONSEQUENCE, _STOPPED = range(5)
"""In `Failure.order`; the launcher stops the ranks that are left when one has failed."""
_KILLED_REMEDY: Final = " Most often the machine ran out of memory: use fewer ranks or a smaller model."
# What a rank says when another one has failed before it.
_CONSEQUENCES: Final = (
    "PeerError",
    "A rank has ended or lost its connection",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One rank's failure.

    Args:
        rank: The rank.
        message: Its error in a few lines, ending as a sentence does.
        order: Sorts failures of one run, the likeliest cause first.
    """

    rank: int
    message: str
    order: tuple[int, float]


def first_failure(error: ChildFailedError, *, log_directory: Path, unfinished: Collection[int]) -> Failure:
    """Find the failure that came before the others.

    A rank that was killed has no time to say anything, while its peers fail at once for want of it; so
    a rank that a signal ended comes first, and an error that only tells of another rank comes last.

    Args:
        error: What the launcher raised: the ranks that it saw fail.
        log_directory: Where it kept the ranks' logs; ranks whose failure it did not wait for have theirs here.
        unfinished: Ranks that left no result.
    """
    failures: dict[int, Failure] = {}
    for path in log_directory.rglob("error.json"):
        rank = int(path.parent.name)
        message = _recorded_message(path)
        is_consequence = any(phrase in message for phrase in _CONSEQUENCES)
        order = (_CONSEQUENCE if is_consequence else _SAID, path.stat().st_mtime)
        failures[rank] = Failure(rank=rank, message=message, order=order)
    stopped = {rank for rank, process in error.failures.items() if process.exitcode == -signal.SIGTERM}
    for rank, process in error.failures.items():
        if process.exitcode < 0 and rank not in stopped:
            failures[rank] = Failure(
                rank=rank,
                message=_killed_message(process.signal_name()),
                order=(_KILLED, float(process.timestamp)),
            )
        elif rank not in failures:
            tail = _stderr_tail(log_directory, rank=rank)
            failures[rank] = Failure(
                rank=rank,
                message=f"it left with status {process.exitcode}. {tail}",
                order=(_LEFT if rank not in stopped else _STOPPED, float(process.timestamp)),
            )
    first = min(failures.values(), key=lambda failure: failure.order)
    # The launcher may not know of a rank's end yet when it sees the peer that failed for want of it.
    silent = sorted(set(unfinished) - set(failures))
    return _silent_failure(silent, before=first) if silent and first.order[0] == _CONSEQUENCE else first


def _silent_failure(silent: list[int], *, before: Failure) -> Failure:
    others = f" So did ranks {', '.join(map(str, silent[1:]))}." if silent[1:] else ""
    return Failure(
        rank=silent[0],
        message=f"it ended without a word.{others}{_KILLED_REMEDY} Rank {before.rank} then said: {before.message}",
        order=before.order,
    )


def _recorded_message(path: Path) -> str:
    try:
        recorded: Any = json.loads(path.read_text(encoding="utf-8"))["message"]
    except (OSError, ValueError, KeyError):
        return f"its error could not be read from {path}."
    message = str(recorded["message"]) if isinstance(recorded, dict) else str(recorded)
    message = message.strip()
    return message if message.endswith((".", "?", "!")) else f"{message}."


def _killed_message(signal_name: str) -> str:
    remedy = _KILLED_REMEDY if signal_name == signal.SIGKILL.name else ""
    return f"it was ended by {signal_name}.{remedy}"


def _stderr_tail(log_directory: Path, *, rank: int) -> str:
    for path in log_directory.rglob("stderr.log"):
        if path.parent.name == str(rank):
            lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            if lines:
                return "Its last lines were:\n" + "\n".join(lines[-_TAIL_LINES:]) + "\n"
    return "It wrote nothing to stderr."
