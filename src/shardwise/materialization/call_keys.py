"""What one call's keys in the process group's store are called."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch.distributed as dist

from shardwise.materialization.call_store import CallStore

_MOST_IN_A_NAME = 16


def name_of(ranks: Sequence[int]) -> str:
    """Return a short name that no other ranks have: it is a part of every key, and of thousands of ranks there are as many keys."""
    text = "-".join(map(str, ranks))
    if len(ranks) <= _MOST_IN_A_NAME:
        return text
    return f"{len(ranks)} of {hashlib.sha256(text.encode()).hexdigest()[:16]}"


class CallKeys:
    """The keys of one call of shardwise.

    Like collectives, shardwise calls must come in one order on all ranks, so the n-th call of every rank over the same ranks is
    the same call. The count is kept in the store: it begins anew with a new process group.

    A rank that never came to a call, which the others gave up and have begun anew, takes part in the new one: else it would stay
    behind for ever.

    Args:
        ranks: Global ranks of the call, in one order on all of them.
        rank: This one.
        store: Of the call.
    """

    def __init__(self, ranks: Sequence[int], *, rank: int, store: CallStore) -> None:
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        group = "all" if len(ranks) == world_size else name_of(ranks)
        self._ranks = ranks
        self._store = store
        self._calls = f"shardwise/{group}/"
        self._number = store.add(f"{self._calls}calls/{rank}", 1)
        store.set(self.of_call("begun"), "")
        while store.has([self._without(rank), f"{self._calls}{self._number + 1}/begun"]):
            self._number = store.add(f"{self._calls}calls/{rank}", 1)
        self._numbered: Counter[str] = Counter()
        self._has_forgotten = False

    @property
    def prefix(self) -> str:
        """Text that is the same on all ranks of this call and that no other call in the process group has."""
        return f"{self._calls}{self._number}"

    def of_call(self, *parts: str) -> str:
        """Return a key that all ranks share."""
        return "/".join((self.prefix, *parts))

    def of_ranks(self, *parts: str) -> dict[int, str]:
        """Return a key of each rank, in the order of the ranks."""
        return {rank: self.of_call(*parts, str(rank)) for rank in self._ranks}

    def give_up(self, late: Sequence[int]) -> None:
        """Note for ranks that have not come that the call has ended without them."""
        for rank in late:
            self._store.set(self._without(rank), "")

    def _without(self, rank: int) -> str:
        return self.of_call("without", str(rank))

    def numbered(self, what: str) -> str:
        """Return a key that no other call of this method has; ranks that make it of one `what` do so in one order."""
        self._numbered[what] += 1
        return self.of_call(what, str(self._numbered[what]))

    def forget_earlier(self) -> None:
        """Delete what earlier calls over these ranks left in the store, once: all ranks are in this one, and look there no more."""
        if self._has_forgotten:
            return
        self._has_forgotten = True

        def is_earlier(key: str) -> bool:
            number = key.removeprefix(self._calls).partition("/")[0]
            return key.startswith(self._calls) and number.isdigit() and int(number) < self._number

        self._store.delete_all(is_earlier)
