"""The plain ways by their formulas, verdicts and rates; and what must hold for any model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import CheckpointError, ConfigurationError
from shardwise.planning.cost import Cost
from shardwise.planning.parameters import PlannedUnit
from shardwise.planning.plain_ways import (
    Job,
    accelerate_stock,
    every_rank_loads,
    rank0_broadcasts,
)
from shardwise.planning.rates import Rates, measured_read_rate
from shardwise.planning.verdict import Limits, Need, verdict
from tests.unit.test_training_state import parameter, unit

GIB = 1 << 30


def job(**changes: Any) -> Job:
    fields: dict[str, Any] = {
        "ranks": 4,
        "ranks_per_node": 2,
        "nodes": 2,
        "on_host": False,
        "offload": False,
        "stored_bytes": 2400,
        "buffer_bytes": 0,
    }
    return Job(**{**fields, **changes})


# Of 4 ranks, in bf16: full tensors of 800, 800 and 800 bytes; shards of 200 each.
EQUAL = [
    unit(parameter(100, fqn="a")),
    unit(parameter(100, fqn="b")),
    unit(parameter(100, fqn="c"), is_root=True),
]
CAST = [unit(parameter(100, fqn=n, dtype=torch.float32, stored_as_kept=False)) for n in "abc"]  # 1600 each


def test_every_rank_loads_on_accelerators() -> None:
    mapped = every_rank_loads(EQUAL, job())
    assert (mapped.host_peak_bytes, mapped.node_host_peak_bytes) == (0, 0)
    assert mapped.device_peak_bytes == 200 + 200 + 800 + 200  # two shards, a whole unit, its shard
    assert (mapped.storage_bytes, mapped.node_storage_bytes, mapped.network_bytes) == (4800, 2400, 0)
    cast = every_rank_loads(CAST, job())
    assert (cast.host_peak_bytes, cast.node_host_peak_bytes) == (4800, 9600)


def test_every_rank_loads_on_cpu_ranks() -> None:
    assert every_rank_loads(EQUAL, job(on_host=True)).host_peak_bytes == 600  # the shards alone are copied
    # All of it, and the first unit's shards; what was sharded goes.
    assert every_rank_loads(CAST, job(on_host=True)).host_peak_bytes == 4800 + 400
    assert every_rank_loads(CAST, job(on_host=True)).device_peak_bytes == 0


def test_every_rank_loads_and_offloads() -> None:
    cost = every_rank_loads(EQUAL, job(offload=True))
    assert cost.host_peak_bytes == 3 * 256  # pinned
    assert cost.device_peak_bytes == 800 + 200


def test_rank_0_broadcasts() -> None:
    cost = rank0_broadcasts(CAST, job())
    assert (cost.host_peak_bytes, cost.node_host_peak_bytes) == (4800, 4800)
    assert cost.device_peak_bytes == 3 * 400 + 1600
    assert (cost.storage_bytes, cost.network_bytes, cost.rank_network_bytes) == (2400, 3 * 4800, 4800)
    assert cost.node_network_bytes == 2 * 4800  # of the node without rank 0
    on_host = rank0_broadcasts(CAST, job(on_host=True))
    assert on_host.host_peak_bytes == 4800 + 1200
    assert on_host.node_host_peak_bytes == (4800 + 1200) + (1200 + 1600)
    mapped = rank0_broadcasts(EQUAL, job(on_host=True))
    assert mapped.host_peak_bytes == 600 + 800  # of the ranks that have no file
    assert rank0_broadcasts(EQUAL, job(ranks=1, ranks_per_node=1, nodes=1)).network_bytes == 0


def test_accelerate_as_it_is() -> None:
    cost = accelerate_stock(EQUAL, job(), upcasts=True)
    assert cost.host_peak_bytes == 3 * 1600  # float32, on every rank
    assert cost.node_host_peak_bytes == 2 * 4800
    assert cost.device_peak_bytes == 3 * 400 + 1600 + 400
    assert cost.rank_network_bytes == 3 * 1600 + 3 * 400
    assert cost.storage_bytes == 4800
    one_node = accelerate_stock(EQUAL, job(ranks_per_node=4, nodes=1), upcasts=True)
    assert one_node.node_network_bytes == one_node.network_bytes == 3 * cost.rank_network_bytes
    as_stored = accelerate_stock(EQUAL, job(), upcasts=False)
    assert as_stored.host_peak_bytes == 0
    assert as_stored.device_peak_bytes == 3 * 200 + 800 + 200
    frozen = [unit(parameter(100, fqn=n, trainable=False)) for n in "abc"]
    assert accelerate_stock(frozen, job(), upcasts=True).host_peak_bytes == 0


shapes = st.lists(st.tuples(st.integers(1, 1000), st.booleans()), min_size=1, max_size=6)


@given(shapes=shapes, ranks=st.sampled_from([2, 4, 8]), on_host=st.booleans())
def test_what_holds_for_every_model(shapes: Sequence[tuple[int, bool]], ranks: int, on_host: bool) -> None:
    units: list[PlannedUnit] = [
        unit(parameter(numel, ranks=ranks, fqn=str(n), stored_as_kept=as_stored))
        for n, (numel, as_stored) in enumerate(shapes)
    ]
    here = job(ranks=ranks, ranks_per_node=ranks // 2, on_host=on_host)
    shards = sum(p.shard_bytes for each in units for p in each.parameters)
    costs: list[Cost] = [
        every_rank_loads(units, here),
        rank0_broadcasts(units, here),
        accelerate_stock(units, here, upcasts=True),
    ]
    for cost in costs:
        peak = cost.host_peak_bytes if on_host else cost.device_peak_bytes
        assert peak >= shards  # nothing is smaller than what is left at the end
        assert cost.host_peak_bytes <= cost.node_host_peak_bytes <= here.ranks_per_node * cost.host_peak_bytes
        assert cost.node_storage_bytes <= cost.storage_bytes
        assert cost.node_network_bytes <= cost.network_bytes
        assert (cost.device_peak_bytes == 0) == on_host
    every, broadcast, stock = costs
    assert broadcast.storage_bytes <= every.storage_bytes == stock.storage_bytes
    assert broadcast.node_host_peak_bytes <= stock.node_host_peak_bytes + every.node_host_peak_bytes


# --- verdicts ---


def need(device_gib: float, host_gib: float = 1.0, *, load_device_gib: float = 0.5) -> Need:
    return Need(
        load_host_bytes=int(host_gib * GIB),
        load_device_bytes=int(load_device_gib * GIB),
        training_host_bytes=0,
        training_device_bytes=int(device_gib * GIB),
    )


def test_what_fits_says_how_much() -> None:
    found = verdict(need(7.04), Limits(host_bytes=2 * GIB, device_bytes=8 * GIB), ())
    assert found.fits
    assert found.text == "fits: 1.0 of 2.0 GiB of host memory of a node, 7.0 of 8.0 GiB on device"


def test_what_does_not_fit_says_what_would() -> None:
    asked: list[str] = []

    def change(name: str, then: Need) -> Any:
        return name, lambda: (asked.append(name), then)[1]

    found = verdict(
        need(16.44),
        Limits(host_bytes=None, device_bytes=15 * GIB),
        (change("--tp 2", need(15.5)), change("--replicas 1", need(8.3)), change("--offload", need(1.0))),
    )
    assert not found.fits
    assert found.text == (
        "does not fit: 16.4 of 15.0 GiB on device, in training; with --tp 2: 15.5 (still too much); with --replicas 1: 8.3"
    )
    assert asked == ["--tp 2", "--replicas 1"]  # nothing is tried beyond what helps


def test_both_memories_and_the_load_are_looked_at() -> None:
    limits = Limits(host_bytes=GIB // 2, device_bytes=2 * GIB)
    found = verdict(need(1.0, 40.0, load_device_gib=3.0), limits, [("x", lambda: need(1.5, 20.0))])
    assert found.text == (
        "does not fit: 40.0 of 0.5 GiB of host memory of a node, at load and 3.0 of 2.0 GiB on device, at load; "
        "with x: 20.0, 1.5 (still too much)"
    )
    assert Limits(host_bytes=None, device_bytes=None).fits(need(1e6))
    assert not Limits(host_bytes=None, device_bytes=None).given


# --- rates ---


def test_seconds_of_reading_and_moving() -> None:
    rates = Rates(read_bytes_per_second=100.0, link_bytes_per_second=10.0)
    assert rates.seconds(read_bytes=1000, moved_bytes=50, at_once=True) == 10.0
    assert rates.seconds(read_bytes=1000, moved_bytes=50, at_once=False) == 15.0
    assert rates.seconds(read_bytes=1000, moved_bytes=500, at_once=True) == 50.0
    unknown = Rates(read_bytes_per_second=100.0, link_bytes_per_second=None)
    assert unknown.seconds(read_bytes=1000, moved_bytes=0, at_once=True) == 10.0
    assert unknown.seconds(read_bytes=1000, moved_bytes=1, at_once=True) is None


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_rates_that_are_refused(value: float) -> None:
    with pytest.raises(ConfigurationError, match="link_bytes_per_second: expected a number above 0"):
        Rates(read_bytes_per_second=1.0, link_bytes_per_second=value)


def test_the_read_rate_is_measured_on_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    (tmp_path / "b").write_bytes(b"")
    assert measured_read_rate([tmp_path / "a", tmp_path / "b"]) > 0
    with pytest.raises(CheckpointError, match=r"expected files of the checkpoint.*--read-gbps"):
        measured_read_rate([tmp_path / "b"])
    with pytest.raises(CheckpointError, match=r"missing: expected to read it.*--read-gbps"):
        measured_read_rate([tmp_path / "missing"])
