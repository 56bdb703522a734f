"""Ranks leave each phase together, or fail together with the first error."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from shardwise.errors import ConfigurationError, PeerError, RankError, RankMismatchError, RankTimeoutError
from shardwise.materialization import Agreement, Comparable, timeout_seconds_of
from shardwise.materialization.call_keys import name_of
from shardwise.materialization.call_store import CallStore
from shardwise.materialization.rank_errors import timeout_error
from shardwise.testing import RankPool
from tests.distributed.steps import SECONDS_TO_COME, logged, naming_only

pytestmark = pytest.mark.distributed

PATIENT_SECONDS = 60.0
PROMPT_SECONDS = 20.0  # an error is to arrive long before that, also on a busy machine


def agreement(ranks: list[int] | None = None) -> Agreement:
    chosen = list(range(dist.get_world_size())) if ranks is None else ranks
    return Agreement(chosen, timeout_seconds=PATIENT_SECONDS, call="wrap_model")


def comparable(text: str) -> Comparable:
    return Comparable(
        what="the colour",
        digest=text,
        details=lambda: json.dumps(text),
        explain=lambda expected, got: f"expected {json.loads(expected)}, got {json.loads(got)}",
        remedy="Paint them alike.",
    )


def wait_for_a_failure(together: Agreement) -> None:
    while True:
        try:
            together.check()
        except PeerError:
            return
        time.sleep(0.01)


# --- all is well ---


def leave_together() -> tuple[float, float]:
    together = agreement()
    with together.phase("slow on rank 1"):
        if dist.get_rank() == 1:
            time.sleep(0.6)
        done = time.time()
    return done, time.time()


def test_nobody_leaves_a_phase_before_the_last_has_done_its_part(pool: RankPool) -> None:
    times = pool.run(leave_together, ranks=3)
    assert min(left for _, left in times) >= max(done for done, _ in times)


def agree_on(texts: list[str]) -> str:
    together = agreement()
    with together.phase("compare") as phase:
        phase.same = comparable(texts[dist.get_rank()])
    with together.phase("next"):
        pass
    return "agreed"


def test_what_is_equal_passes(pool: RankPool) -> None:
    assert pool.run(agree_on, ["red"] * 4, ranks=4) == ["agreed"] * 4


def test_one_rank_agrees_with_itself(pool: RankPool) -> None:
    assert pool.run(agree_on, ["red"], ranks=1) == ["agreed"]


def pass_texts_around() -> tuple[str, list[str]]:
    together = agreement()
    rank = dist.get_rank()
    with together.phase("talk"):
        published = together.publish("word", "grün" if rank == 1 else None)
        gathered = together.gather("ranks", f"text of {rank}")
    return published, gathered


def test_publish_and_gather_reach_every_rank(pool: RankPool) -> None:
    texts = [f"text of {rank}" for rank in range(3)]
    assert pool.run(pass_texts_around, ranks=3) == [("grün", texts)] * 3


def gather_counting_keys() -> tuple[list[str], int]:
    together, asked, original = agreement(), [0], CallStore.has

    def counted(self: CallStore, keys: Sequence[str]) -> bool:
        asked.append(len(keys))
        return original(self, keys)

    with together.phase("talk"), mock.patch.object(CallStore, "has", counted):
        if dist.get_rank() == 2:
            time.sleep(0.3)
        found = together.gather("who", str(dist.get_rank()))
    return found, max(asked)


def test_a_rank_asks_for_one_key_whatever_the_number_of_ranks(pool: RankPool) -> None:
    for found, most_keys in pool.run(gather_counting_keys, ranks=4):
        assert found == ["0", "1", "2", "3"]
        assert most_keys <= 1


def gather_over_a_part() -> list[list[str]]:
    rank = dist.get_rank()
    ranks = [3, 1] if rank % 2 else [0, 2]
    found = []
    for call in range(2):
        together = agreement(ranks=ranks)
        with together.phase("talk"):
            found.append(together.gather("who", f"{rank} in call {call}"))
    with agreement().phase("all"):
        pass
    return found


def test_parts_of_the_ranks_agree_among_themselves(pool: RankPool) -> None:
    results = pool.run(gather_over_a_part, ranks=4)
    assert results[0] == results[2] == [[f"{rank} in call {call}" for rank in (0, 2)] for call in range(2)]
    assert results[1] == results[3] == [[f"{rank} in call {call}" for rank in (3, 1)] for call in range(2)]


def names_of_calls() -> list[str]:
    part = [0, 1] if dist.get_rank() < 2 else [2]
    return [agreement().name, agreement(ranks=part).name, agreement().name]


def test_each_call_has_a_name_of_its_own_that_all_ranks_know(pool: RankPool) -> None:
    first, second, other = pool.run(names_of_calls, ranks=3)
    assert first == second
    assert len(set(first)) == 3
    assert (other[0], other[2]) == (first[0], first[2])


# --- one rank fails ---


def fail_on(rank: int, text: str) -> None:
    together = agreement()
    with together.phase("load"):
        if dist.get_rank() == rank:
            time.sleep(0.3)
            raise FileNotFoundError(text)
    with together.phase("next"):  # no rank may get here
        raise AssertionError("the phase was left")


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_reaches_every_waiting_rank(pool: RankPool, failing: int) -> None:
    errors = pool.run_to_errors(fail_on, failing, "model.safetensors is not there", ranks=3)
    for rank in range(3):
        if rank == failing:
            assert type(errors[rank]) is FileNotFoundError
            assert str(errors[rank]) == "model.safetensors is not there"
        else:
            assert type(errors[rank]) is PeerError
            assert str(errors[rank]) == (
                f"wrap_model, phase 'load': rank {failing} on {socket.gethostname()} failed first: "
                "FileNotFoundError: model.safetensors is not there"
            )


def seconds_until_failure_is_known() -> float:
    together = agreement()
    try:
        with together.phase("load"):
            if dist.get_rank() == 0:
                time.sleep(0.5)
                raise ValueError(repr(time.time()))
    except PeerError as error:
        return time.time() - float(str(error).rpartition("ValueError: ")[2])
    except ValueError:
        return 0.0
    raise AssertionError("the phase was left")


def test_a_failure_is_known_long_before_the_timeout(pool: RankPool) -> None:
    assert max(pool.run(seconds_until_failure_is_known, ranks=2)) < PROMPT_SECONDS


def arrive_after_the_failure() -> None:
    together = agreement()
    with together.phase("load"):
        if dist.get_rank() == 1:
            raise ValueError("at once")
        wait_for_a_failure(together)


def test_a_rank_that_arrives_after_the_failure_learns_of_it(pool: RankPool) -> None:
    errors = pool.run_to_errors(arrive_after_the_failure, ranks=2)
    assert type(errors[0]) is PeerError
    assert "rank 1 on" in str(errors[0])
    assert "ValueError: at once" in str(errors[0])


def fail_in_turn() -> None:
    together = agreement()
    with together.phase("load"):
        if dist.get_rank() == 1:
            wait_for_a_failure(together)
        if dist.get_rank() < 2:
            raise ValueError(f"error of rank {dist.get_rank()}")


def test_the_first_error_wins(pool: RankPool) -> None:
    errors = pool.run_to_errors(fail_in_turn, ranks=3)
    assert [str(error) for error in errors[:2]] == ["error of rank 0", "error of rank 1"]
    assert type(errors[2]) is PeerError
    assert "rank 0 on" in str(errors[2])
    assert str(errors[2]).endswith("failed first: ValueError: error of rank 0")


def fail_before_publishing() -> None:
    together = agreement()
    with together.phase("load"):
        if dist.get_rank() == 0:
            raise ValueError("nothing to say")
        together.publish("word", None)


def test_a_rank_that_waits_inside_of_a_phase_learns_of_the_failure(pool: RankPool) -> None:
    errors = pool.run_to_errors(fail_before_publishing, ranks=2)
    assert type(errors[1]) is PeerError
    assert str(errors[1]).endswith(
        f"rank 0 on {socket.gethostname()} failed first: ValueError: nothing to say"
    )


def poll_until_peer_fails() -> int:
    together = agreement()
    polls = 0
    with together.phase("transfer"):
        if dist.get_rank() == 0:
            time.sleep(0.6)
            raise ConnectionError("cable")
        while True:  # as a transfer that never completes
            together.check()
            polls += 1
            time.sleep(0.001)


def test_check_raises_while_data_would_still_be_moving(pool: RankPool) -> None:
    errors = pool.run_to_errors(poll_until_peer_fails, ranks=2)
    assert "ConnectionError: cable" in str(errors[1])
    assert type(errors[1]) is PeerError


def retry_after_failure() -> str:
    try:
        fail_on(1, "first try")
    except (FileNotFoundError, PeerError):
        pass
    else:
        raise AssertionError("expected a failure")
    together = agreement()
    with together.phase("load"):
        return together.publish("word", "second try" if dist.get_rank() == 0 else None)


def test_a_retry_in_the_same_process_works(pool: RankPool) -> None:
    assert pool.run(retry_after_failure, ranks=2) == ["second try"] * 2


# --- ranks differ ---


def test_what_differs_is_named_on_every_rank(pool: RankPool) -> None:
    errors = pool.run_to_errors(agree_on, ["red", "red", "blue", "green"], ranks=4)
    expected = (
        "wrap_model, phase 'compare': the colour on rank 2, 3 is not that of rank 0: expected red, got blue. "
        "Paint them alike."
    )
    assert [str(error) for error in errors] == [expected] * 4
    assert {type(error) for error in errors} == {RankMismatchError}


def test_a_difference_of_the_first_rank_is_seen_from_there(pool: RankPool) -> None:
    errors = pool.run_to_errors(agree_on, ["blue", "red"], ranks=2)
    assert all("on rank 1 is not that of rank 0: expected blue, got red" in str(error) for error in errors)


# --- a rank is late ---


def agreement_with_impatience(timeout_seconds: float) -> Agreement:
    """Return an agreement that loses its patience only after every rank is there."""
    together = agreement()
    with together.phase("begin"):
        pass
    together.timeout_seconds = timeout_seconds
    return together


def wait_for_others(together: Agreement, what: str, *, count: int) -> None:
    """Wait until so many ranks have come to what one of them does for all."""
    counter = together._keys.of_call(together._phase, what)
    deadline = time.monotonic() + SECONDS_TO_COME
    while together._store.add(counter, 0) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def be_late(late: int) -> None:
    together = agreement_with_impatience(0.5)
    with naming_only(late), together.phase("check"):
        if dist.get_rank() == late:
            wait_for_a_failure(together)
    with together.phase("next"):
        raise AssertionError("the phase was left")


def test_a_late_rank_is_named_at_the_timeout_and_told(pool: RankPool) -> None:
    errors = pool.run_to_errors(be_late, 2, ranks=3)
    waiting = [error for error in errors[:2] if type(error) is RankTimeoutError]
    assert waiting
    assert "for the other ranks; rank 2 (of 3 ranks) did not arrive. Check that every rank makes" in str(
        waiting[0]
    )
    assert "wrap_model, phase 'check': rank " in str(waiting[0])
    assert " waited 0.5 s " in str(waiting[0])
    assert "pass a longer timeout" in str(waiting[0])
    for error in errors:
        if error not in waiting:
            assert type(error) is PeerError
            assert "RankTimeoutError" in str(error)
            assert "rank 2 (of 3 ranks) did not arrive" in str(error)
    assert errors[2] not in waiting  # it learns at once that it is too late


def wait_for_a_text_that_never_comes() -> None:
    together = agreement_with_impatience(0.5)
    with together.phase("load"):
        if dist.get_rank() == 0:
            wait_for_a_failure(together)
        else:
            together.publish("word", None)


def test_a_text_that_never_comes_blames_no_rank_that_is_there(pool: RankPool) -> None:
    errors = pool.run_to_errors(wait_for_a_text_that_never_comes, ranks=2)
    assert type(errors[1]) is RankTimeoutError
    assert "rank 1 waited 0.5 s for the source rank's word. Check" in str(errors[1])
    assert "did not arrive" not in str(errors[1])
    assert type(errors[0]) is PeerError


def gather_without_rank_1() -> None:
    together = agreement_with_impatience(0.5)
    if dist.get_rank() == 0:
        together.gather("report", "mine")


def test_a_rank_that_gives_no_text_is_named(pool: RankPool) -> None:
    errors = pool.run_to_errors(gather_without_rank_1, ranks=2)
    assert type(errors[0]) is RankTimeoutError
    assert "for every rank's report; rank 1 (of 2 ranks) did not arrive" in str(errors[0])
    assert errors[1] is None


def test_of_very_many_late_ranks_some_are_named() -> None:
    text = str(timeout_error("load", "news", rank=0, seconds=5, late=range(1, 4096), ranks=4096))
    assert (
        "; ranks 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16 and 4,079 more (of 4096 ranks) did not arrive. "
        in text
    )


def give_up_together() -> tuple[str, int]:
    """Return the error and how often this rank asked which ones are late."""
    together, late_of, asked = agreement_with_impatience(0.5), Agreement._late, [0]

    def when_all_give_up(self: Agreement, key_of_rank: Mapping[int, str]) -> list[int]:
        asked[0] += 1
        wait_for_others(self, "give up the other ranks", count=3)
        return late_of(self, key_of_rank)

    with mock.patch.object(Agreement, "_late", when_all_give_up):
        try:
            with together.phase("check"):
                if dist.get_rank() == 1:
                    wait_for_a_failure(together)
        except RankError as error:
            return str(error), asked[0]
    raise AssertionError("the phase was left")


def test_of_the_ranks_that_give_up_one_asks_which_are_late(pool: RankPool) -> None:
    found = pool.run(give_up_together, ranks=4)
    assert all("rank 1 (of 4 ranks) did not arrive" in text for text, _ in found)
    assert sum(asked for _, asked in found) == 1


def miss_a_call() -> list[str]:
    """Return the names of the calls that went well."""
    went_well = []
    for turn in range(3):
        if turn > 0 or dist.get_rank() != 1:
            together = Agreement((0, 1, 2), timeout_seconds=1.0 if turn == 0 else 20.0, call="wrap_model")
            try:
                with together.phase("check"):
                    pass
                went_well.append(together.name)
            except RankError:
                assert turn == 0
        dist.barrier()
        if dist.get_rank() == 1:
            time.sleep(0.3)  # the others have begun anew
    return went_well


def test_a_rank_that_missed_a_call_takes_part_in_the_next(pool: RankPool) -> None:
    """As where it failed before it came to the call, and all ranks try again together."""
    first, *others = pool.run(miss_a_call, ranks=3)
    assert len(first) == 2
    assert others == [first, first]


def test_thousands_of_ranks_have_a_short_name() -> None:
    """It is a part of each of their keys."""
    many = list(range(5000))
    assert name_of([3, 1]) == "3-1"
    assert len(name_of(many)) < 50
    assert len({name_of(many), name_of(many[1:]), name_of(many[::-1])}) == 3


# --- a rank takes long ---


def take_long(late: int) -> tuple[list[str], list[str], int]:
    """Return what this rank warned of in a phase and while it waited for a text, and for how many ranks' keys it asked."""
    together = agreement_with_impatience(PATIENT_SECONDS)
    together.warn_after_seconds = 0.3
    with naming_only(late) as asked:
        with logged() as of_phase, together.phase("read"):
            if dist.get_rank() == late:
                wait_for_others(together, "warn of the other ranks", count=2)
        with logged() as of_text, together.phase("talk"):
            if dist.get_rank() == late:
                wait_for_others(together, "warn of the source rank's word", count=2)
            together.publish("word", "now" if dist.get_rank() == late else None)
            together.warn_after_seconds = PATIENT_SECONDS  # at the end of the phase nobody is late
    return of_phase, of_text, asked.call_count


@pytest.mark.parametrize("late", [0, 2])
def test_a_rank_that_takes_long_is_named_once(pool: RankPool, late: int) -> None:
    found = pool.run(take_long, late, ranks=3)
    goes_on = "the wait goes on for at most 60 s (timeout=)"
    by_rank = [(rank, line) for rank, (of_phase, _, _) in enumerate(found) for line in of_phase]
    assert len(by_rank) == 1
    assert by_rank[0][1] == (
        f"wrap_model, phase 'read': rank {by_rank[0][0]} has waited 0.3 s for the other ranks; rank {late} (of 3 "
        f"ranks) did not arrive; {goes_on}"
    )
    by_rank = [(rank, line) for rank, (_, of_text, _) in enumerate(found) for line in of_text]
    assert len(by_rank) == 1
    assert by_rank[0][1] == (
        f"wrap_model, phase 'talk': rank {by_rank[0][0]} has waited 0.3 s for the source rank's word; {goes_on}"
    )
    # Of thousands of ranks that wait, one asks the store about each of the others.
    assert sum(asked for _, _, asked in found) == 2


# --- timeouts in words ---


@pytest.mark.parametrize(
    ("timeout", "seconds"), [(None, 1800.0), (5, 5.0), (0.5, 0.5), (timedelta(minutes=2), 120.0)], ids=str
)
def test_timeouts_are_seconds(timeout: float | timedelta | None, seconds: float) -> None:
    assert timeout_seconds_of(timeout, group=None) == seconds


@pytest.mark.parametrize(
    "timeout", ["15", True, 0, -1.0, float("nan"), float("inf"), timedelta(0), [5]], ids=str
)
def test_what_is_no_timeout_is_refused(timeout: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^timeout: expected .* got ") as caught:
        timeout_seconds_of(timeout, group=None)
    assert repr(timeout) in str(caught.value)


def own_timeouts() -> tuple[float, float]:
    group = dist.new_group(timeout=timedelta(seconds=77))
    asked = timeout_seconds_of(None, group=group), timeout_seconds_of(3, group=group)
    dist.barrier(group)  # a rank that leaves it at once breaks the connections that the other still makes
    dist.destroy_process_group(group)
    return asked


def test_none_is_the_groups_own_timeout(pool: RankPool) -> None:
    assert pool.run(own_timeouts, ranks=2) == [(77.0, 3.0)] * 2
