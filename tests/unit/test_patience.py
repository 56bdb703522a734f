"""How long a rank waits for others: by the steps that they make."""

from __future__ import annotations

import pytest

from shardwise.materialization import patience as patience_module
from shardwise.materialization.patience import Patience


class Clock:
    """Time, and the steps of all ranks, as a test says."""

    timeout_seconds = 10.0

    def __init__(self) -> None:
        self.now = 100.0
        self.made = 0
        self.asked = 0

    def monotonic(self) -> float:
        return self.now

    def steps(self) -> int:
        self.asked += 1
        return self.made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(patience_module, "time", made)
    return made


def seconds_until_over(clock: Clock, *, step_every: float, until: float) -> float:
    patience = Patience(clock)
    started, last_step = clock.now, clock.now
    while not patience.is_over():
        clock.now += 0.5
        if clock.now - started <= until and clock.now - last_step >= step_every:
            clock.made += 1
            last_step = clock.now
        assert clock.now - started < 200, "it never ends"
    return clock.now - started


def test_without_a_step_it_is_over_at_the_timeout(clock: Clock) -> None:
    assert seconds_until_over(clock, step_every=1.0, until=0.0) == 10.5


def test_steps_of_any_rank_prolong_it_and_the_last_one_counts(clock: Clock) -> None:
    # 4 s apart, less than the timeout, for ten times the timeout; what was seen at the first look is no step.
    ended = seconds_until_over(clock, step_every=4.0, until=100.0)
    assert 100 + 10 <= ended <= 100 + 10 + 2


def test_steps_further_apart_than_the_timeout_do_not(clock: Clock) -> None:
    assert seconds_until_over(clock, step_every=11.0, until=100.0) == 10.5


@pytest.mark.parametrize("stops_at", [0.5, 5.0])
def test_a_process_that_was_stopped_has_not_waited_meanwhile(clock: Clock, stops_at: float) -> None:
    patience = Patience(clock)
    clock.now += stops_at
    assert not patience.is_over()
    clock.now += 1000.0  # nobody has made a step: the others were stopped too
    assert not patience.is_over()
    began = clock.now
    while not patience.is_over():
        clock.now += 0.5
        assert clock.now - began < 50, "it never ends"
    assert clock.now - began >= 10 - stops_at - 2.5  # what one look counts at most


def test_the_store_is_asked_ten_times_in_a_timeout(clock: Clock) -> None:
    patience = Patience(clock)
    for _ in range(1000):
        clock.now += 0.01
        patience.is_over()
    assert clock.asked <= 10
