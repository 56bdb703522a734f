"""Our own groups: any number in one call, and none that needs ranks outside of it."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import shardwise as sw
from shardwise.materialization import Agreement, data_plane
from shardwise.materialization.data_plane import DataPlane, open_data_plane
from shardwise.materialization.own_group import make_group
from shardwise.testing import RankPool
from tests.distributed.steps import SECONDS_TO_COME

pytestmark = pytest.mark.distributed

SECONDS_TO_CLOSE = 2 * data_plane._SECONDS_FOR_THE_CAUSE / 3
"""Each of two groups; together longer than a rank whose transfer breaks off waits to hear why."""


def exchange_ranks(plane: DataPlane, size: int) -> list[int]:
    send = torch.full((size,), dist.get_rank(), dtype=torch.uint8)
    receive = torch.empty(size, dtype=torch.uint8)
    plane.wait(plane.all_to_all(receive, send, receive_bytes=[1] * size, send_bytes=[1] * size), what="test")
    return receive.tolist()


def open_two() -> list[list[int]]:
    agreement = Agreement((0, 1), timeout_seconds=30, call="test")
    found = []
    with agreement.phase("both"):
        for _ in range(2):
            with open_data_plane((0, 1), device=torch.device("cpu"), agreement=agreement) as plane:
                found.append(exchange_ranks(plane, 2))
    return found


def test_two_planes_in_one_call(pool: RankPool) -> None:
    assert pool.run(open_two, ranks=2) == [[[0, 1], [0, 1]]] * 2


def leave_at_once() -> dict[int, str]:
    """Open a group that rank 1 makes late and nobody uses; return who had made it when this rank was let in."""
    agreement = Agreement((0, 1), timeout_seconds=30, call="test")

    def make_late(*args: Any, **options: Any) -> dist.ProcessGroup:
        made = make_group(*args, **options)
        if dist.get_rank() == 1:
            time.sleep(0.5)
        agreement.note("made", "yes")
        return made

    with (
        mock.patch.object(data_plane, "make_group", make_late),
        agreement.phase("exchange"),
        open_data_plane((0, 1), device=torch.device("cpu"), agreement=agreement),
    ):
        return agreement.noted("made")


def test_nobody_leaves_a_group_before_every_rank_has_made_it(pool: RankPool) -> None:
    assert pool.run(leave_at_once, ranks=2) == [{0: "yes", 1: "yes"}] * 2


def fail_while_another_connects() -> str:
    """Rank 0 fails with the group in its hands, and says so a moment after its connections have closed."""
    agreement = Agreement((0, 1), timeout_seconds=30, call="test")

    def broken(*args: Any, **options: Any) -> dist.ProcessGroup:
        if dist.get_rank() == 0:
            time.sleep(0.3)
            raise sw.CheckpointError("cut short")
        raise RuntimeError("Gloo connectFullMesh failed with: Connection closed by peer")

    with (
        mock.patch.object(data_plane, "make_group", broken),
        pytest.raises(sw.ShardwiseError) as error,
        agreement.phase("exchange"),
        open_data_plane((0, 1), device=torch.device("cpu"), agreement=agreement),
    ):
        raise NotImplementedError
    return f"{type(error.value).__name__}: {error.value}"


def test_a_rank_that_cannot_connect_tells_the_cause(pool: RankPool) -> None:
    first, second = pool.run(fail_while_another_connects, ranks=2)
    assert first == "CheckpointError: cut short"
    assert second.startswith("PeerError: test, phase 'exchange': rank 0")
    assert "CheckpointError: cut short" in second


def give_up_a_busy_rank() -> tuple[str, bool]:
    """Rank 1 has the group and does something else until rank 0 has given it up; return the error, and whether that came to pass."""
    agreement, is_given_up = Agreement((0, 1), timeout_seconds=60, call="test"), False
    try:
        with (
            agreement.phase("exchange"),
            open_data_plane((0, 1), device=torch.device("cpu"), agreement=agreement) as plane,
        ):
            agreement.timeout_seconds = 0.5
            if dist.get_rank() == 0:
                exchange_ranks(plane, 2)
            deadline = time.monotonic() + SECONDS_TO_COME
            while not is_given_up and time.monotonic() < deadline:
                time.sleep(0.01)
                is_given_up = 0 in agreement.noted("gave up")
    except sw.ShardwiseError as error:
        agreement.note("gave up", "yes")
        return str(error), is_given_up
    raise AssertionError("the phase was left")


def test_a_rank_that_gives_up_does_not_wait_for_the_other_to_let_go_of_the_group(pool: RankPool) -> None:
    (text, _), (of_other, is_given_up) = pool.run(give_up_a_busy_rank, ranks=2)
    assert "no rank made a step for 0.5 s" in text
    assert "no rank made a step for 0.5 s" in of_other
    assert is_given_up


def fail_and_close_slowly() -> str:
    """Rank 0 fails with two groups in its hands, of which the second takes longer to close than the other rank waits for a cause."""
    agreement, original = Agreement((0, 1), timeout_seconds=60, call="test"), data_plane._let_go

    def slowly(last: list[dist.ProcessGroup]) -> None:
        original(last)
        if dist.get_rank() == 0:
            time.sleep(SECONDS_TO_CLOSE)

    try:
        with (
            mock.patch.object(data_plane, "_let_go", slowly),
            agreement.phase("exchange"),
            ExitStack() as stack,
        ):
            for _ in range(2):
                plane = stack.enter_context(
                    open_data_plane((0, 1), device=torch.device("cpu"), agreement=agreement)
                )
            if dist.get_rank() == 0:
                raise sw.CheckpointError("cut short")
            exchange_ranks(plane, 2)
    except sw.ShardwiseError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("the phase was left")


def test_a_rank_tells_the_cause_before_it_closes_connections(pool: RankPool) -> None:
    first, second = pool.run(fail_and_close_slowly, ranks=2)
    assert first == "CheckpointError: cut short"
    assert second.startswith("PeerError: test, phase 'exchange': rank 0")
    assert "CheckpointError: cut short" in second


def bound_default_group() -> tuple[bool, str]:
    """Make a group over a part of the ranks where the default one is bound to a device, as on accelerators."""
    c10d = dist.distributed_c10d
    default, device = dist.group.WORLD, torch.device("cuda", 0)
    splits = []
    original = c10d._get_split_source
    c10d._get_split_source = lambda group: splits.append(group)
    default.bound_device_id = device
    try:
        if dist.get_rank() < 2:  # rank 2 is not in the call and can take no part in a split
            agreement = Agreement((0, 1), timeout_seconds=30, call="test")
            with (
                agreement.phase("exchange"),
                open_data_plane((0, 1), device=torch.device("cpu"), agreement=agreement) as plane,
            ):
                assert exchange_ranks(plane, 2) == [0, 1]
        return default.bound_device_id == device, f"{len(splits)} splits"
    finally:
        c10d._get_split_source = original
        default.bound_device_id = None


def test_a_bound_default_group_is_not_split_and_stays_bound(pool: RankPool) -> None:
    assert pool.run(bound_default_group, ranks=3) == [(True, "0 splits")] * 3
