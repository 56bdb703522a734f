"""What a rank does to plan its part of a load does not grow with the ranks of the job: counted in calls, not in seconds."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from shardwise.checkpoint import StateDictSource
from shardwise.materialization.collector import resting_collector
from shardwise.materialization.source_plan import SourcePlan, plan_sources
from shardwise.materialization.wanted import Wanted
from shardwise.plan import Sight, WantedTensor
from tests.unit.test_routes import layout_of, wanted_of

FEW, MANY = 256, 8192
SHAPES = [
    (32_768, 256),
    (131_072, 64),
    (8192, 512),
    (8192, 32),
]  # rows that every number of ranks here divides


def sight_of(ranks: int) -> Sight:
    everyone = tuple(range(ranks))
    return Sight(ranks=everyone, nodes=tuple(f"node {rank // 8}" for rank in everyone), readers=everyone)


def plan_of(wanted: list[WantedTensor], route: str, sight: Sight) -> SourcePlan:
    """Return what one rank does for its part of a load."""
    source = StateDictSource({"w": torch.empty(1)})
    (plan,) = plan_sources(
        [Wanted(source=source, pieces=tuple(wanted), converted=())],
        sights=[sight],
        route=route,
        rank=len(sight.ranks) // 2,
        device=torch.device("cpu"),
        staging_bytes=2**26,
        cpu_storage="copy",
        on_host=True,
    )
    return plan


def calls(route: str, ranks: int, *, tensors: int, axes: tuple[Placement, ...] = (Shard(0),)) -> int:
    """Return how many Python functions one rank calls to plan its part of a load."""
    sizes = (2, ranks // 2) if len(axes) == 2 else (ranks,)
    wanted = wanted_of(
        layout_of(*zip(sizes, axes, strict=True)), [SHAPES[i % len(SHAPES)] for i in range(tensors)]
    )
    sight = sight_of(ranks)
    count = 0

    def profile(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal count
        count += event == "call"  # resuming a generator is one too

    before = sys.getprofile()
    with resting_collector():  # what it frees may call functions too
        sys.setprofile(profile)
        try:
            plan_of(wanted, route, sight)
        finally:
            sys.setprofile(before)
    return count


@pytest.mark.parametrize("route", ["auto", "direct"])
def test_a_rank_that_reads_for_itself_does_not_ask_what_others_read(route: str) -> None:
    assert calls(route, MANY, tensors=32) <= calls(route, FEW, tensors=32)


@pytest.mark.parametrize(
    ("route", "axes"),
    [
        ("direct", (Shard(1),)),
        ("replicate", (Replicate(), Shard(0))),
        ("rank0", (Shard(0),)),
        ("striped", (Shard(0),)),
    ],
    ids=str,
)
def test_ranks_that_exchange_list_each_other_once_and_not_for_each_tensor(
    route: str, axes: tuple[Placement, ...]
) -> None:
    few, many = (calls(route, ranks, tensors=32, axes=axes) for ranks in (FEW, MANY))
    assert many - few <= 6 * (MANY - FEW)
    more_tensors = calls(route, MANY, tensors=64, axes=axes) - calls(route, FEW, tensors=64, axes=axes)
    assert more_tensors <= 1.1 * max(many - few, MANY - FEW)


@pytest.mark.parametrize("route", ["auto", "striped", "rank0"])
def test_twenty_thousand_small_tensors_are_few_reads_and_messages(route: str) -> None:
    wanted = wanted_of(layout_of((3, Shard(0))), [(8, 16)] * 20_000)
    plan = plan_of(wanted, route, sight_of(3))
    assert not plan.direct.reads
    (exchange,) = plan.exchanges
    assert sum(exchange.arriving.values()) > 20_000 * 8 * 16 / 4
    assert len(exchange) <= 5  # rounds, of one read and one message to each rank
