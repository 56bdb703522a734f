"""Ranks start and finish each phase together, or fail together with the first error.

Each phase of a call has one outcome, a key in the process group's store: the last rank to arrive sets it to `ok`, the
first rank to fail sets it to its error, and every rank waits for that one key. So a failed rank need not wait for
anybody, a waiting rank learns of a failure at once, and a rank that never arrives is named at the timeout. Nothing
here uses a collective: the store works before, between and after collectives, also when some of them are stuck.

A rank that fails outside of a phase sets a key of the call, which every waiting rank looks at too.

What a call leaves in the store is deleted by the next one over the same ranks, once they have all come to it.
"""

from __future__ import annotations

import json
import logging
import socket
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from shardwise.errors import PeerError, RankError, RankTimeoutError
from shardwise.materialization.call_keys import CallKeys
from shardwise.materialization.call_store import CallStore
from shardwise.materialization.comparable import Comparable
from shardwise.materialization.lifeline import Lifeline
from shardwise.materialization.packed_text import packed, unpacked
from shardwise.materialization.patience import Patience
from shardwise.materialization.rank_errors import (
    ended_error,
    mismatch_error,
    named_late,
    peer_error,
    timeout_error,
)
from shardwise.profiling import phase as record_phase

_log = logging.getLogger("shardwise")

_OK = "ok"
_WARN_AFTER_SECONDS = 20.0
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.0003, 0.5
_POLL_SECONDS_WHILE_MOVING = 0.25
_RANKS_AT_FULL_PACE = 2048
"""One process has the store: of more ranks each asks it less often."""
_SECONDS_BETWEEN_STEPS = 1.0
_SECONDS_FOR_THE_LAUNCHER = (
    1.0  # to end this rank and name the one that died, where it is on the same machine
)
_MOST_SECONDS_TO_TELL = 5.0  # how long the store's host stays for ranks that do not know of a failure yet


@dataclass(slots=True)
class Phase:
    """A phase in progress on this rank.

    Args:
        same: What must be equal on all ranks when the phase ends, if anything.
    """

    same: Comparable | None = None


class Agreement:
    """One collective call of shardwise, seen from one rank.

    Args:
        ranks: Global ranks that take part, in one order on all of them.
        timeout_seconds: How long to wait while no rank makes a step.
        call: Name of the call, for messages.
    """

    def __init__(self, ranks: Sequence[int], *, timeout_seconds: float, call: str) -> None:
        self.ranks = tuple(ranks)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.timeout_seconds = timeout_seconds
        self.warn_after_seconds = _WARN_AFTER_SECONDS
        self._call = call
        self._store = CallStore(call=call)
        self._keys = CallKeys(self.ranks, rank=self.rank, store=self._store)
        self._phase = ""
        self._pace = max(1.0, len(self.ranks) / _RANKS_AT_FULL_PACE)
        self._last_check_seconds = 0.0
        self._last_step_seconds = 0.0
        self._lifeline = Lifeline(self.ranks, rank=self.rank, store=self._store, prefix=self._keys.prefix)
        weakref.finalize(self, self._lifeline.close)
        self._is_connected = False
        self._has_left = False

    @property
    def name(self) -> str:
        """Text that is the same on all ranks of this call and that no other call in the process group has."""
        return self._keys.prefix

    def numbered(self, what: str) -> str:
        """Return a text that no other call of this method has; ranks that make it of one `what` do so in one order."""
        return self._keys.numbered(what)

    def step(self) -> None:
        """Say that this rank has moved on: read something, received something, initialised a module."""
        seconds = time.monotonic()
        if seconds - self._last_step_seconds >= self._pace * _SECONDS_BETWEEN_STEPS:
            self._last_step_seconds = seconds
            with suppress(RankError):  # whoever waits for another rank next says that the store is lost
                self._store.add(self._keys.of_call("steps"), 1)

    def steps(self) -> int:
        """Return how many steps all ranks have told so far; see `Patience`."""
        return self._store.add(self._keys.of_call("steps"), 0)

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Run a phase on all ranks; leave it together, or raise the first error everywhere.

        Args:
            name: Of the phase; the same on all ranks, unique within the call.

        Yields:
            A place for what must be equal on all ranks when the phase ends.

        Raises:
            PeerError: Another rank failed first.
            RankMismatchError: What must be equal differs.
            RankTimeoutError: A rank did not arrive in time.
        """
        self._phase = name
        together = Phase()
        try:
            with record_phase(name):
                yield together
        except BaseException as error:
            self._fail(error)
            raise
        try:
            self._end(together.same)
        except RankError:
            self._leave()
            raise

    @contextmanager
    def whole_call(self) -> Iterator[None]:
        """Tell the others of an error between two phases too, where they wait for this rank in the next one."""
        try:
            yield
        except BaseException as error:
            if not self._has_left:
                self.refuse(error)
            raise

    def refuse(self, error: BaseException) -> None:
        """Tell the others, whatever phase of the call they are in, that this rank leaves it with an error."""
        self._tell(error, at=self._failed_key)
        self._leave()

    def _end(self, same: Comparable | None) -> None:
        with record_phase("agree"):
            self._arrive(same.digest if same is not None else "")
            outcome = self._await_outcome()
        if same is not None and "mismatch" in outcome:
            reference, differing = outcome["mismatch"]
            self._raise_mismatch(reference, differing, same)
        self._raise_peer_error(outcome)
        if not self._is_connected:  # all ranks are in the call now
            self._is_connected = True
            self._lifeline.connect()
        self._lifeline.look()
        if self.rank == self.ranks[0]:
            self._keys.forget_earlier()

    def publish(self, key: str, value: str | None) -> str:
        """Hand a text from the one rank that has it to all others.

        Args:
            key: The same on all ranks, unique within the call.
            value: The text on the rank that has it, None elsewhere.

        Returns:
            The text, on every rank.
        """
        full_key = self._keys.of_call(key)
        if value is not None:
            self._store.set(full_key, value)
            return value
        self._wait([full_key], what=f"the source rank's {key}", key_of_rank={})
        return self._store.get([full_key])[0]

    def gather(self, key: str, value: str) -> list[str]:
        """Return every rank's text, in the order of `ranks`."""
        if len(self.ranks) == 1:
            return [value]
        key_of_rank = self._keys.of_ranks(key)
        everything = self._keys.of_call(key, "all")
        self._store.set(key_of_rank[self.rank], value)
        # The last one puts the texts together: if each rank asked for all the others', the store would have their square to send.
        if self._store.add(self._keys.of_call(key, "there"), 1) == len(self.ranks):
            texts = self._store.get(list(key_of_rank.values()))
            self._store.set(everything, packed(json.dumps(texts)))
            return texts
        self._wait([everything], what=f"every rank's {key}", key_of_rank=key_of_rank)
        found: list[str] = json.loads(unpacked(self._store.get([everything])[0]))
        return found

    def note(self, key: str, value: str) -> None:
        """Leave a text for other ranks to look at; a later one takes its place."""
        self._store.set(self._keys.of_call(key, str(self.rank)), value)

    def noted(self, key: str) -> dict[int, str]:
        """Return what ranks have noted so far, by rank, without waiting."""
        keys = self._keys.of_ranks(key)
        there = [rank for rank, full_key in keys.items() if self._store.has([full_key])]
        texts = self._store.get([keys[rank] for rank in there]) if there else []
        return dict(zip(there, texts, strict=True))

    def check(self, *, now: bool = False) -> None:
        """Raise if another rank has failed in this phase, or one next to this one has ended; cheap enough to call while data moves.

        Args:
            now: Ask even if that was done a moment ago.

        Raises:
            PeerError: Another rank has failed.
            RankError: A rank next to this one has ended.
        """
        seconds = time.monotonic()
        if now or seconds - self._last_check_seconds >= self._pace * _POLL_SECONDS_WHILE_MOVING:
            self._last_check_seconds = seconds
            self._is_settled()
            if ended := self._lifeline.ended():
                self._raise_ended(ended)

    def hear(self, *, within_seconds: float) -> None:
        """Wait for another rank's error, for a while.

        Raises:
            PeerError: Another rank has failed.
            RankError: A rank next to this one has ended.
        """
        deadline = time.monotonic() + within_seconds
        while time.monotonic() < deadline:
            self.check(now=True)
            time.sleep(self._pace * _LONGEST_PAUSE_SECONDS / 10)

    def _raise_ended(self, ended: str) -> None:
        """Raise for a rank that has ended, unless it has failed and told why, or has done its part of the call."""
        deadline = time.monotonic() + _SECONDS_FOR_THE_LAUNCHER
        while time.monotonic() < deadline:
            if self._is_settled():
                return
            time.sleep(_LONGEST_PAUSE_SECONDS / 10)
        raise ended_error(self._where, ended, rank=self.rank)

    def _is_settled(self) -> bool:
        """Return whether all ranks have done their part of the phase.

        Raises:
            PeerError: One has failed in it, or outside of a phase.
        """
        is_settled = self._store.has([self._outcome_key])
        if is_settled:
            self._raise_peer_error(self._outcome(self._outcome_key))
        if self._store.has([self._failed_key]):
            self._raise_peer_error(self._outcome(self._failed_key))
        return is_settled

    @property
    def _where(self) -> str:
        return f"{self._call}, phase {self._phase!r}"

    @property
    def _outcome_key(self) -> str:
        return self._keys.of_call(self._phase, "outcome")

    @property
    def _failed_key(self) -> str:
        return self._keys.of_call("failed")

    @property
    def _arrival_keys(self) -> dict[int, str]:
        return self._keys.of_ranks(self._phase, "rank")

    def _outcome(self, key: str) -> dict[str, Any]:
        outcome: dict[str, Any] = json.loads(self._store.get([key])[0])
        return outcome

    def _settle(self, outcome: dict[str, Any]) -> None:
        # Only the first outcome of a phase counts.
        self._store.set_once(self._outcome_key, json.dumps(outcome))

    def tell(self, error: BaseException) -> None:
        """Tell the others what this rank fails with in the phase, before it closes what they wait on. It must leave the phase with it."""
        self._tell(error, at=self._outcome_key)

    def _tell(self, error: BaseException, *, at: str) -> None:
        if not isinstance(error, PeerError):
            try:
                self._store.set_once(at, json.dumps(self._failure(error)))
            except RankError as lost:  # the store's host has ended; the first error is what matters
                note = f"The other ranks could not be told: {lost}"
                if note not in getattr(error, "__notes__", ()):
                    error.add_note(note)

    def _fail(self, error: BaseException) -> None:
        self.tell(error)
        self._leave()

    def _failure(self, error: BaseException) -> dict[str, Any]:
        text = f"{type(error).__name__}: {error}"
        return {"rank": self.rank, "host": socket.gethostname(), "error": text[:8000]}

    def _leave(self) -> None:
        """After a failure: say that this rank knows, and let the store live until all do, if it is in this process."""
        self._has_left = True
        counter = self._keys.of_call("told")
        with suppress(RankError):
            self._store.add(counter, 1)
            self._store.wait_if_host(counter, count=len(self.ranks), timeout_seconds=_MOST_SECONDS_TO_TELL)
        self._lifeline.close()

    def _arrive(self, digest: str) -> None:
        self._store.set(self._arrival_keys[self.rank], digest)
        if self._store.add(self._keys.of_call(self._phase, "arrived"), 1) < len(self.ranks):
            return
        digests = self._store.get(list(self._arrival_keys.values()))
        differing = [rank for rank, text in zip(self.ranks, digests, strict=True) if text != digests[0]]
        self._settle({"mismatch": [self.ranks[0], differing]} if differing else {_OK: True})

    def _await_outcome(self) -> dict[str, Any]:
        try:
            self._wait([self._outcome_key], what="the other ranks", key_of_rank=self._arrival_keys)
        except RankTimeoutError as error:
            # Told to the others too: a rank that arrives later must not begin the next phase alone.
            self._settle(self._failure(error))
            outcome = self._outcome(self._outcome_key)
            if outcome.get("rank") == self.rank:
                raise
            return outcome  # the last rank arrived, or another one failed, at this very moment
        return self._outcome(self._outcome_key)

    def _wait(self, keys: list[str], *, what: str, key_of_rank: Mapping[int, str]) -> None:
        """Wait until all keys are there; name the ranks whose own key is not in a warning, and in the error at the timeout."""
        started = time.monotonic()
        patience = Patience(self)
        has_warned = False
        while not self._store.has(keys):
            waited = time.monotonic() - started
            if patience.is_over():
                if not self._is_first_to(f"give up {what}"):
                    self.hear(within_seconds=self._pace * _MOST_SECONDS_TO_TELL)
                late = self._late(key_of_rank)
                self._keys.give_up(late)
                raise timeout_error(
                    self._where,
                    what,
                    rank=self.rank,
                    seconds=self.timeout_seconds,
                    late=late,
                    ranks=len(self.ranks),
                )
            if waited > self.warn_after_seconds and not has_warned:
                has_warned = True
                if self._is_first_to(f"warn of {what}"):
                    self._warn_of_wait(what, key_of_rank)
            self.check()
            # Short waits stay quick and long ones do not load the store's host.
            time.sleep(
                min(
                    self._pace * _LONGEST_PAUSE_SECONDS,
                    max(self._pace * _SHORTEST_PAUSE_SECONDS, waited / 20),
                )
            )

    def _is_first_to(self, do: str) -> bool:
        """Return whether no other rank has come to this point of the phase: each would ask the store for each, which is their square."""
        return self._store.add(self._keys.of_call(self._phase, do), 1) == 1

    def _warn_of_wait(self, what: str, key_of_rank: Mapping[int, str]) -> None:
        _log.warning(
            "%s: rank %d has waited %g s for %s%s; the wait goes on for at most %g s (timeout=)",
            self._where,
            self.rank,
            self.warn_after_seconds,
            what,
            named_late(self._late(key_of_rank), of=len(self.ranks)),
            self.timeout_seconds,
        )

    def _late(self, key_of_rank: Mapping[int, str]) -> list[int]:
        return [rank for rank, key in key_of_rank.items() if not self._store.has([key])]

    def _raise_peer_error(self, outcome: dict[str, Any]) -> None:
        if "error" in outcome:
            raise peer_error(self._where, outcome)

    def _raise_mismatch(self, reference: int, differing: list[int], same: Comparable) -> None:
        all_keys = self._keys.of_ranks(self._phase, "details")
        key_of_rank = {rank: all_keys[rank] for rank in (reference, differing[0])}
        if self.rank in key_of_rank:
            self._store.set(key_of_rank[self.rank], same.details())
        keys = list(key_of_rank.values())
        self._wait(keys, what="the other ranks' details", key_of_rank=key_of_rank)
        expected, got = self._store.get(keys)
        raise mismatch_error(
            self._where, same, reference=reference, differing=differing, expected=expected, got=got
        )


def ranks_of_group(group: dist.ProcessGroup | None) -> tuple[int, ...]:
    """Return the global ranks of a group, None being the default one; rank 0 alone where there is no process group."""
    if not dist.is_initialized():
        return (0,)
    return tuple(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD))
