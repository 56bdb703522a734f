"""Which rank failed first, and what it said."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_TAIL_LINES: Final = 12
# What a rank says when another one has failed before it.
_CONSEQUENCES: Final = ("PeerError", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


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


def first_failure(error: ChildFailedError, *, log_directory: Path) -> Failure:
    """Find the failure that came before the others.

    A rank that was killed has no time to say anything, while its peers fail at once for want of it; so
    a rank that a signal ended comes first, and an error that only tells of another rank comes last.

    Args:
        error: What the launcher raised: the ranks that it saw fail.
        log_directory: Where it kept the ranks' logs; ranks whose failure it did not wait for have theirs here.
    """
    failures: dict[int, Failure] = {}
    for path in log_directory.rglob("error.json"):
        rank = int(path.parent.name)
        message = _recorded_message(path)
        is_consequence = any(phrase in message for phrase in _CONSEQUENCES)
        failures[rank] = Failure(
            rank=rank, message=message, order=(2 if is_consequence else 1, path.stat().st_mtime)
        )
    for rank, process in error.failures.items():
        if process.exitcode < 0 and process.exitcode != -signal.SIGTERM:
            failures[rank] = Failure(
                rank=rank, message=_killed_message(process.signal_name()), order=(0, float(process.timestamp))
            )
        elif rank not in failures:
            tail = _stderr_tail(log_directory, rank=rank)
            failures[rank] = Failure(
                rank=rank,
                message=f"it left with status {process.exitcode}. {tail}",
                order=(3, float(process.timestamp)),
            )
    return min(failures.values(), key=lambda failure: failure.order)


def _recorded_message(path: Path) -> str:
    try:
        recorded: Any = json.loads(path.read_text(encoding="utf-8"))["message"]
    except (OSError, ValueError, KeyError):
        return f"its error could not be read from {path}."
    message = str(recorded["message"]) if isinstance(recorded, dict) else str(recorded)
    message = message.strip()
    return message if message.endswith((".", "?", "!")) else f"{message}."


def _killed_message(signal_name: str) -> str:
    remedy = (
        " Most often the machine ran out of memory: use fewer ranks or a smaller model."
        if signal_name == signal.SIGKILL.name
        else ""
    )
    return f"it was ended by {signal_name}.{remedy}"


def _stderr_tail(log_directory: Path, *, rank: int) -> str:
    for path in log_directory.rglob("stderr.log"):
        if path.parent.name == str(rank):
            lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            if lines:
                return "Its last lines were:\n" + "\n".join(lines[-_TAIL_LINES:]) + "\n"
    return "It wrote nothing to stderr."
