"""Connections by which ranks notice that a process next to them has ended: who is named, and who is not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest

from shardwise.materialization.call_store import CallStore
from shardwise.materialization.lifeline import Lifeline

LONGEST_SECONDS = 60.0  # of waiting for what must come


class Keys:
    """A store of this process, reached over a network that is this machine."""

    host_address: tuple[str, int] | None = ("127.0.0.1", 1)

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, keys: Sequence[str]) -> list[str]:
        return [self.values[key] for key in keys]


def lifeline(keys: Keys, rank: int, *, of: int) -> Lifeline:
    return Lifeline(tuple(range(of)), rank=rank, store=cast(CallStore, keys), prefix="call")


@contextmanager
def connected(keys: Keys, *, of: int) -> Iterator[list[Lifeline]]:
    """Ranks of one process that know each other."""
    made = [lifeline(keys, rank, of=of) for rank in range(of)]
    for each in made:
        each.connect()
    if keys.host_address is not None and of > 1:
        wait_until(lambda: all(map(is_known, made)), made)
    yield made
    for each in made:
        each.close()


@pytest.fixture
def ring() -> Iterator[list[Lifeline]]:
    with connected(Keys(), of=3) as made:
        yield made


def is_known(line: Lifeline) -> bool:
    """Whether both neighbours have greeted a rank."""
    return all(each is not None and each.is_greeted for each in (line._to_next, line._from_previous))


def wait_until(condition: Callable[[], bool], lines: Sequence[Lifeline]) -> None:
    """Let all of them look until it is so; a busy machine may be late."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never comes to that"
        for each in lines:
            each.look()
        time.sleep(0.01)


def look(lines: Sequence[Lifeline], times: int = 30) -> list[str]:
    """Let all of them look some times, with a pause after each, and return what each found in the end."""
    for _ in range(times):
        found = [each.ended() for each in lines]
        time.sleep(0.01)
    return found


def named_by(lines: Sequence[Lifeline], rank: int) -> bool:
    """Wait until each of them names a rank of this host."""
    name = f"rank {rank} on {socket.gethostname()}"
    wait_until(lambda: all(each.ended() for each in lines), lines)
    return all(each.ended() == name for each in lines)


def drop(line: Lifeline) -> None:
    """Close what a rank has open as the system does when its process ends."""
    parts: Any = line
    for each in (parts._to_next, parts._from_previous):
        if each is not None:
            each._connection.close()
            each.is_closed = True
    if parts._listener is not None:
        parts._listener.close()


def test_nobody_is_named_while_all_live(ring: list[Lifeline]) -> None:
    assert look(ring) == ["", "", ""]


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_both_neighbours_name_a_rank_whose_connections_close(ring: list[Lifeline], dead: int) -> None:
    drop(ring[dead])
    assert named_by([line for rank, line in enumerate(ring) if rank != dead], dead)


def test_a_rank_that_leaves_is_not_named(ring: list[Lifeline]) -> None:
    ring[1].close()
    assert look([ring[0], ring[2]]) == ["", ""]
    ring[2].close()
    ring[2].close()  # twice does no harm
    assert look(ring[:1]) == [""]


def test_two_ranks_and_one() -> None:
    with connected(Keys(), of=2) as two:
        assert look(two) == ["", ""]
        drop(two[1])
        assert named_by(two[:1], 1)
    with connected(Keys(), of=1) as alone:
        assert look(alone, 5) == [""]


def test_a_rank_that_dies_before_its_greeting_is_not_believed() -> None:
    """Something between the ranks may take a connection and close it at once."""
    keys = Keys()
    made = [lifeline(keys, rank, of=2) for rank in range(2)]
    made[0].connect()
    drop(made[1])
    assert look(made[:1]) == [""]
    for each in made:
        each.close()


def test_strangers_are_sent_away() -> None:
    keys = Keys()
    late, other = lifeline(keys, 0, of=2), lifeline(keys, 1, of=2)
    _, place, _ = json.loads(keys.values["call/listens/0"])
    strangers = [socket.create_connection(tuple(place)) for _ in range(3)]
    strangers[0].sendall(b"GET / HTTP/1.1")
    strangers[1].close()
    other.connect()
    late.connect()
    wait_until(lambda: is_known(late) and is_known(other), [late, other])
    assert look([late, other]) == ["", ""]
    with pytest.raises(ConnectionError):  # nobody listens there any more
        strangers.append(socket.create_connection(tuple(place)))
    drop(other)
    assert named_by([late], 1)
    for each in (*strangers, late, other):
        each.close()


def test_without_a_network_nobody_is_told() -> None:
    keys = Keys()
    keys.host_address = None
    with connected(keys, of=2) as two:
        assert look(two, 5) == ["", ""]


PROGRAM = """
import sys, time
from tests.unit.test_lifeline import Keys, is_known, lifeline, wait_until
keys = Keys()
own = lifeline(keys, 1, of=2)
print(keys.values["call/listens/1"], flush=True)
keys.values["call/listens/0"] = sys.stdin.readline()
own.connect()
wait_until(lambda: is_known(own), [own])
print("they know each other", flush=True)
while True:
    own.ended()
    time.sleep(0.01)
"""


def test_a_process_that_is_stopped_is_not_named_and_one_that_is_killed_is() -> None:
    keys = Keys()
    own = lifeline(keys, 0, of=2)
    other = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdin is not None
        assert other.stdout is not None
        keys.values["call/listens/1"] = other.stdout.readline()
        other.stdin.write(keys.values["call/listens/0"] + "\n")
        other.stdin.flush()
        own.connect()
        wait_until(lambda: is_known(own), [own])
        assert other.stdout.readline() == "they know each other\n"
        assert look([own]) == [""]
        os.kill(other.pid, signal.SIGSTOP)
        assert look([own], 100) == [""]
        other.kill()
        assert named_by([own], 1)
    finally:
        other.kill()
        other.communicate()
        own.close()
