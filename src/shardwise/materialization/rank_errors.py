"""What a rank is told about other ranks that failed, differ or are late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.errors import PeerError, RankError, RankMismatchError, RankTimeoutError, shortened
from shardwise.materialization.comparable import Comparable

_MOST_NAMED = 16


def peer_error(where: str, outcome: Mapping[str, Any]) -> PeerError:
    """Return the error for another rank's failure.

    Args:
        where: Call and phase.
        outcome: Of the phase: rank, host and error.
    """
    return PeerError(f"{where}: rank {outcome['rank']} on {outcome['host']} failed first: {outcome['error']}")


def ended_error(where: str, ended: str, *, rank: int) -> RankError:
    """Return the error for a rank whose process has ended.

    Args:
        where: Call and phase.
        ended: That rank and its host.
        rank: This one, next to it.
    """
    return RankError(
        f"{where}: {ended} has ended, or its machine is gone: its connection to rank {rank} closed without a word. Look at the end of "
        "its log, and for the kernel's out-of-memory killer there."
    )


def mismatch_error(
    where: str, same: Comparable, *, reference: int, differing: Sequence[int], expected: str, got: str
) -> RankMismatchError:
    """Return the error for something that is not equal on all ranks.

    Args:
        where: Call and phase.
        same: What should be equal.
        reference: Rank that the others are compared with.
        differing: Ranks that differ from it.
        expected: Details of the reference.
        got: Details of the first rank that differs.
    """
    return RankMismatchError(
        f"{where}: {same.what} on rank {listed_ranks(differing)} is not that of rank {reference}: "
        f"{same.explain(expected, got)}. {same.remedy}"
    )


def timeout_error(
    where: str, what: str, *, rank: int, seconds: float, late: Sequence[int], ranks: int
) -> RankTimeoutError:
    """Return the error for a wait that took too long.

    Args:
        where: Call and phase.
        what: Was waited for.
        rank: This one.
        seconds: That it waited, while no rank made a step.
        late: Ranks that did not arrive, if that is known.
        ranks: Number of ranks of the call.
    """
    return RankTimeoutError(
        f"{where}: rank {rank} waited {seconds:g} s for {what}{named_late(late, of=ranks)}. "
        "Check that every rank makes the same shardwise calls in the same order, look at the logs of the other "
        "ranks, or pass a longer timeout."
    )


def named_late(late: Sequence[int], *, of: int) -> str:
    """Return part of a message that names late ranks; empty where there are none."""
    return (
        f"; rank{'s' * (len(late) > 1)} {listed_ranks(late)} (of {of} ranks) did not arrive" if late else ""
    )


def listed_ranks(ranks: Sequence[int]) -> str:
    """Return the first of some ranks as text, and how many more they are."""
    return shortened(ranks, most=_MOST_NAMED, between=", ")
