"""Our own groups: any number in one call, and none that needs ranks outside of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardwise as sw
from shardwise.materialization import Agreement
from shardwise.materialization.data_plane import DataPlane, open_data_plane
from shardwise.testing import RankPool
from tests.distributed.models import check_equal, from_checkpoint
from tests.distributed.steps import load

pytestmark = pytest.mark.distributed


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


class WithHead(nn.Module):
    """A deferred model and a head whose values the source rank holds."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(64, 70, dtype=torch.bfloat16)


def wrap_with_head(directory: str) -> str:
    strategy = sw.NativeFSDPStrategy(timeout=60, cpu_storage="copy", mixed_precision="no")
    body = load(strategy, directory, defer=True)
    columns = [name for name, _ in body.named_parameters() if name.endswith("o_proj.weight")]
    strategy.fsdp_config = sw_config(columns)
    model = WithHead(body)
    strategy.wrap_model(model)
    check_equal(model.body, from_checkpoint(directory))
    assert strategy.last_report is not None
    assert strategy.last_report.network_bytes > 0
    return strategy.last_report.route


def sw_config(columns: list[str]) -> object:
    raise NotImplementedError(columns)


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
