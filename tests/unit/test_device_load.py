"""A whole load onto an accelerator that is not there: values, what is pinned, and that nothing of it is left."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import Shard

from shardwise import materialize
from shardwise.checkpoint import StateDictSource
from shardwise.errors import CheckpointError
from shardwise.materialization import (
    Agreement,
    device_placing,
    exchange,
    from_files,
    load,
    read_ahead,
    scatter,
)
from shardwise.materialization.awaited_source import awaited
from shardwise.plan import Bucket, Layout, PlannedTensor, plan_exchange, plan_scatter
from shardwise.tensors import TensorSpec
from tests.unit.accelerator_fakes import DEVICE, HOST, FakeAccelerator, FakePinned
from tests.unit.accelerator_fakes import accelerator as accelerator
from tests.unit.test_load_plan import empty_shard, wanted_tensors

SMALL, ROWS = 80, 3000
STAGING_BYTES = 2**18


class Model(nn.Module):
    """Large tensors, of which one is read in many chunks, and small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(64, ROWS)
        self.other = nn.Linear(ROWS, 10)
        self.small = nn.ParameterList(nn.Parameter(torch.zeros(7)) for _ in range(SMALL))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {name: torch.randn(p.shape).bfloat16() for name, p in Model().named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def loading(accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    """Shards lie in host memory, and the load takes them for memory of a device."""

    def placing(targets: Any, *, device: torch.device, lanes: int, scratch_bytes: int) -> Any:
        assert device == DEVICE
        return device_placing.DevicePlacing(targets, device=HOST, lanes=lanes, scratch_bytes=scratch_bytes)

    for module in (load, exchange):
        monkeypatch.setattr(module, "device_of_targets", lambda _: DEVICE)
        monkeypatch.setattr(module, "DevicePlacing", placing)
    monkeypatch.setattr(from_files, "device_of_shards", lambda *_: DEVICE)
    monkeypatch.setattr(read_ahead, "PinnedMemory", FakePinned)
    return accelerator


def load_into(directory: Path) -> nn.Module:
    with torch.device("meta"):
        model = Model()
    # In another dtype than on disk nothing goes straight into host memory.
    materialize(model, str(directory), dtype=torch.float32, cpu_storage="copy", staging_bytes=STAGING_BYTES)
    return model


def test_values_arrive_through_pinned_memory_that_is_given_back(
    directory: Path, loading: FakeAccelerator
) -> None:
    model = load_into(directory)
    stored = load_file(directory / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), stored[name].float()), name
    assert loading.pinned == []
    # Bytes travel as they are stored, and each of them once.
    assert sum(tensor.nbytes for tensor in stored.values()) <= loading.travelled_bytes
    assert loading.travelled_bytes <= 1.02 * sum(tensor.nbytes for tensor in stored.values())
    log = loading.log
    assert log.count("host to device") >= 2 * ROWS * 64 // STAGING_BYTES
    assert max(int(line.split()[1]) for line in log if line.startswith("place")) >= SMALL
    # Each stream begins after the current one, and the current one waits for it once, before memory goes.
    for lane in {line for line in log if line.startswith("on lane")}:
        name = lane.removeprefix("on ")
        began, ended = (
            log.index(f"{name} waits for current stream"),
            log.index(f"current stream waits for {name}"),
        )
        assert log.count(f"current stream waits for {name}") == 1
        assert began < log.index(lane) < ended < max(i for i, line in enumerate(log) if line == "unpinned")
    assert log[-1] == "unpinned"


def test_nothing_stays_pinned_after_a_failure(
    directory: Path, loading: FakeAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv

    def failing(fd: int, parts: Any, offset: int) -> int:
        if offset > STAGING_BYTES:  # in the middle, whichever thread reads first
            raise PermissionError(13, "no")
        return preadv(fd, parts, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError, match="no"):
        load_into(directory)
    assert loading.pinned == []
    lanes = {line.removeprefix("on ") for line in loading.log if line.startswith("on lane")}
    assert lanes
    for name in lanes:  # what was on its way has arrived before its memory went
        assert loading.log.index(f"host waits for {name}") < loading.log.index("unpinned")


def test_what_is_read_together_lands_as_well(loading: FakeAccelerator) -> None:
    wanted = wanted_tensors(70, (30, 4), Shard(0), ranks=1)
    nbytes = max(piece.stored.stop for tensor in wanted for piece in tensor.pieces)
    content = torch.randint(0, 100, (nbytes,), dtype=torch.uint8)  # nothing that is no number
    plan = plan_exchange(wanted, range(70), ranks=(0,), rank=0, buffer_bytes=4096, readers=(0,))
    expected = {tensor.fqn: empty_shard(tensor, 0).double() for tensor in wanted}
    got = {fqn: shard.clone() for fqn, shard in expected.items()}
    for targets in (expected, got):
        loading.log.clear()
        alone = Agreement((0,), timeout_seconds=60.0, call="materialize")
        with awaited(Bytes(content), alone, name="memory") as source, pytest.MonkeyPatch.context() as patch:
            if targets is expected:
                patch.setattr(exchange, "device_of_targets", lambda _: HOST)
            exchange.Exchange(plan, source=source, targets=targets, plane=None, done=lambda _: None).run()
        if targets is expected:
            assert loading.log == []
    assert all(torch.equal(got[fqn], shard) for fqn, shard in expected.items())
    rounds = loading.log.count("on lane 1")
    assert 1 < rounds < 70
    assert loading.log.count("host to device") == rounds  # one for each slice
    assert sum(line.startswith("host waits for event") for line in loading.log) == rounds
    assert loading.pinned == []


class Bytes:
    """A source that is one file."""

    tensors: dict[str, Any] = {}  # noqa: RUF012  nothing asks for one

    def __init__(self, content: torch.Tensor) -> None:
        self._content = memoryview(content.numpy())

    def read_into(self, file: str, offset: int, into: memoryview) -> None:
        into[:] = self._content[offset : offset + len(into)]


class Plane:
    """Carries nothing, and keeps what was handed to it."""

    def __init__(self, packed: Callable[[], torch.Tensor] | None) -> None:
        self.packed = packed
        self.buckets: list[torch.Tensor] = []

    def scatter(self, into: torch.Tensor, slots: Sequence[torch.Tensor], *, source_rank: int) -> None:
        self.buckets.append(self.packed().clone() if self.packed else torch.stack(list(slots)))

    def wait(self, work: None, *, what: str) -> None:
        pass


def test_the_source_rank_packs_in_host_memory_and_copies_whole_buckets(
    accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[FakePinned] = []

    def pinned(*args: Any, **options: Any) -> FakePinned:
        made.append(FakePinned(*args, **options))
        return made[-1]

    monkeypatch.setattr(scatter, "PinnedMemory", pinned)
    layout = Layout(mesh_shape=(2,), mesh_ranks=(0, 1), placements=(Shard(0),))
    tensors = {f"t{index}": torch.randn(7, 5) for index in range(40)}
    planned = [
        PlannedTensor(spec=TensorSpec(fqn=fqn, shape=(7, 5), dtype=torch.float32), layout=layout)
        for fqn in tensors
    ]
    plan = plan_scatter(planned, ranks=(0, 1), source_rank=0, staging_bytes=4096, direct_from_bytes=None)
    buckets = []
    for device in (HOST, torch.device("meta")):
        plane = Plane((lambda: made[0].bytes) if device.type == "meta" else None)
        targets = {fqn: torch.zeros(4, 5) for fqn in tensors}
        source = StateDictSource(dict(tensors))
        scatter.Scatter(plan, source=source, targets=targets, rank=0, device=device).run(plane)  # type: ignore[arg-type]
        assert all(torch.equal(targets[fqn], tensors[fqn][:4]) for fqn in tensors)
        buckets.append([bucket.flatten() for bucket in plane.buckets])
    on_host, on_device = buckets
    assert len(on_host) == len(on_device) == len(plan.buckets) > 2
    for index, bucket in enumerate(plan.buckets):  # between its pieces a buffer is undefined
        assert isinstance(bucket, Bucket)
        for position, pieces in enumerate(bucket.slots):
            for piece in pieces:
                start = position * plan.slot_bytes + piece.offset_bytes
                stop = start + 4 * math.prod(piece.region.shape)
                assert torch.equal(on_host[index][start:stop], on_device[index][start:stop])
    assert accelerator.pinned == []
