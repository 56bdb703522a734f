"""Bytes on their way to a device that is not there: values, the order of copies and streams, and what is not allocated."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwise.conversion.pieces import whole
from shardwise.materialization.device_placing import DevicePlacing, device_of_targets
from shardwise.materialization.landings import DIRECT_FROM_BYTES, Landing
from shardwise.materialization.read import Shards
from shardwise.plan import WantedTensor, plan_reads
from tests.unit.accelerator_fakes import HOST, FakeAccelerator
from tests.unit.accelerator_fakes import accelerator as accelerator
from tests.unit.test_load_plan import Case, checkpoints, empty_shard

SCRATCH_BYTES = 256
TAKEN_BY_THE_KERNEL = {  # torch: aten/src/ATen/native/cuda/ForeachBinaryOpList.cu, AT_DISPATCH_SOURCE_TYPES
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
}


def placing_into(
    targets: dict[str, torch.Tensor], *, lanes: int = 2, scratch_bytes: int = SCRATCH_BYTES
) -> DevicePlacing:
    return DevicePlacing(targets, device=HOST, lanes=lanes, scratch_bytes=scratch_bytes)


def targets_of(wanted: Sequence[WantedTensor], rank: int, *, widened: bool) -> dict[str, torch.Tensor]:
    shards = {tensor.fqn: empty_shard(tensor, rank) for tensor in wanted}
    if widened:
        return {fqn: shard.double() if shard.is_floating_point() else shard for fqn, shard in shards.items()}
    return shards


@given(case=checkpoints(), max_read_bytes=st.sampled_from([16, 64, 4096]), widened=st.booleans())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_read_lands_as_it_does_in_host_memory(
    accelerator: FakeAccelerator,
    case: Case,
    max_read_bytes: int,
    widened: bool,
) -> None:
    for rank in case.ranks:
        wanted = [tensor for tensor in case.wanted if tensor.mapped_on(rank) is None]
        plan = plan_reads(wanted, rank=rank, max_read_bytes=max_read_bytes, joins_runs=True)
        expected = targets_of(wanted, rank, widened=widened)
        got = targets_of(wanted, rank, widened=widened)
        here, placing = Shards(expected, placing=None), placing_into(got)
        there = Shards(got, placing=placing)
        for read in plan.reads:
            buffer = torch.frombuffer(bytearray(case.content[read.start : read.stop]), dtype=torch.uint8)
            assert here.place(read, buffer) is None
            assert there.place(read, buffer.clone()) is not None
        placing.close()
        for fqn, shard in expected.items():
            assert torch.equal(got[fqn].view(-1).view(torch.uint8), shard.view(-1).view(torch.uint8)), fqn


def small_tensors(count: int, dtype: torch.dtype) -> tuple[list[Landing], torch.Tensor]:
    nbytes = 8 * dtype.itemsize
    landings = [
        Landing(fqn=f"{index}", dtype=dtype, piece=whole((8,)), offset=index * nbytes, is_packed=False)
        for index in range(count)
    ]
    return landings, torch.arange(count * 8).to(dtype).view(torch.uint8)


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
def test_many_small_tensors_are_one_copy_and_one_call(
    accelerator: FakeAccelerator, kept: torch.dtype
) -> None:
    landings, buffer = small_tensors(100, torch.bfloat16)
    targets = {landing.fqn: torch.zeros(8, dtype=kept) for landing in landings}
    placing = placing_into(targets, scratch_bytes=buffer.numel())
    placing.place(buffer, landings)
    assert accelerator.log.count("host to device") == 1
    assert [line for line in accelerator.log if line.startswith("place")] == ["place 100"]
    together = torch.cat([targets[landing.fqn] for landing in landings])
    assert torch.equal(together, buffer.view(torch.bfloat16).to(kept))


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        (torch.float8_e8m0fnu, torch.float32),
        (torch.uint16, torch.float32),
        (torch.float32, torch.float8_e8m0fnu),
        (torch.complex128, torch.complex128),
        (torch.float8_e8m0fnu, torch.float8_e8m0fnu),
        (torch.bool, torch.bfloat16),
        (torch.float64, torch.bfloat16),
    ],
)
def test_what_the_devices_kernel_for_many_tensors_does_not_take_is_placed_one_by_one(
    accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, kept: torch.dtype
) -> None:
    together = torch._foreach_copy_

    def kernel(places: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        for tensor in (*places, *values):
            if tensor.dtype not in TAKEN_BY_THE_KERNEL:
                raise NotImplementedError(f'"foreach_tensor_copy" not implemented for {tensor.dtype}')
        together(places, values)

    monkeypatch.setattr(torch, "_foreach_copy_", kernel)
    landings, buffer = small_tensors(3, stored)
    targets = {landing.fqn: torch.zeros(8, dtype=kept) for landing in landings}
    placing = placing_into(targets, scratch_bytes=buffer.numel())
    placing.place(buffer, landings)
    got = torch.cat([targets[landing.fqn].view(torch.uint8) for landing in landings])
    assert torch.equal(got, buffer.view(stored).to(kept).view(torch.uint8))


def test_a_large_run_of_the_same_dtype_needs_no_scratch_memory(accelerator: FakeAccelerator) -> None:
    numel = DIRECT_FROM_BYTES // 2
    values = torch.randn(numel).to(torch.bfloat16)
    landing = Landing(fqn="a", dtype=torch.bfloat16, piece=whole((numel,)), offset=1, is_packed=False)
    buffer = torch.cat([torch.zeros(1, dtype=torch.uint8), values.view(torch.uint8)])
    targets = {"a": torch.zeros(numel, dtype=torch.bfloat16)}
    placing_into(targets).place(buffer, [landing])
    assert torch.equal(targets["a"], values)
    assert accelerator.log == [
        "lane 1 waits for current stream",
        "on lane 1",
        "host to device",
        "event 1 of lane 1",
        "off",
    ]


def test_a_buffer_is_free_when_it_has_travelled_and_not_when_all_is_placed(
    accelerator: FakeAccelerator,
) -> None:
    landings, buffer = small_tensors(4, torch.float32)
    targets = {landing.fqn: torch.zeros(8) for landing in landings}
    placing = placing_into(targets)
    placing.place(buffer, landings)
    placing.place(buffer, landings)
    placing.place(buffer, landings)
    placing.close()
    assert accelerator.log == [
        *(
            "lane 1 waits for current stream",
            "on lane 1",
            "host to device",
            "event 1 of lane 1",
            "place 4",
            "off",
        ),
        *(
            "lane 2 waits for current stream",
            "on lane 2",
            "host to device",
            "event 1 of lane 2",
            "place 4",
            "off",
        ),
        *("on lane 1", "host to device", "event 2 of lane 1", "place 4", "off"),
        *("current stream waits for lane 1", "current stream waits for lane 2"),
        *("host waits for lane 1", "host waits for lane 2"),
    ]
    accelerator.log.clear()
    placing.close()
    assert accelerator.log == []


def test_scratch_memory_is_used_again_within_a_buffer_and_grows_for_one_landing(
    accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    empty = torch.empty

    def counted(*sizes: int, **options: object) -> torch.Tensor:
        made.append(sizes[0])
        return empty(*sizes, **options)  # type: ignore[call-overload, no-any-return]

    landings, buffer = small_tensors(20, torch.float32)  # 32 bytes each
    targets = {landing.fqn: torch.zeros(8) for landing in landings}
    placing = placing_into(targets, lanes=1, scratch_bytes=64)
    monkeypatch.setattr(torch, "empty", counted)
    placing.place(buffer, landings)
    assert made == [64]
    assert accelerator.log.count("host to device") == 10
    # Each copy but the last is placed before the next one takes its memory; the last one after the event.
    assert accelerator.log[-3:] == ["event 1 of lane 1", "place 2", "off"]
    assert all(torch.equal(targets[f"{i}"], torch.arange(8 * i, 8 * i + 8).float()) for i in range(20))
    long = Landing(fqn="long", dtype=torch.float32, piece=whole((40,)), offset=0, is_packed=False)
    targets["long"] = torch.zeros(40, dtype=torch.float64)
    accelerator.log.clear()
    placing.place(buffer, [long])
    assert made == [64, 0, 160]
    assert accelerator.log[:2] == ["host waits for lane 1", "lane 1 waits for current stream"]
    assert torch.equal(targets["long"], torch.arange(40).double())


def test_nothing_is_copied_on_the_device_to_be_aligned(
    accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("device memory that is in no plan")

    buffer = torch.arange(64, dtype=torch.uint8)
    landings = [
        Landing(fqn="a", dtype=torch.float32, piece=whole((2,)), offset=3, is_packed=False),
        Landing(fqn="b", dtype=torch.int16, piece=whole((3,)), offset=14, is_packed=False),
    ]
    targets = {"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.int16)}
    monkeypatch.setattr(torch.Tensor, "clone", refused)
    placing_into(targets).place(buffer, landings)
    assert bytes(targets["a"].view(torch.uint8).tolist()) == bytes(range(3, 11))
    assert bytes(targets["b"].view(torch.uint8).tolist()) == bytes(range(14, 20))


def test_shards_in_other_memory_are_filled_at_once(accelerator: FakeAccelerator) -> None:
    landings, buffer = small_tensors(1, torch.float32)
    targets = {"0": torch.zeros(8)}
    elsewhere = DevicePlacing(targets, device=torch.device("cuda", 3), lanes=2, scratch_bytes=64)
    assert elsewhere.place(buffer, landings) is None
    assert torch.equal(targets["0"], torch.arange(8).float())
    assert accelerator.log == []


def test_the_device_of_shards() -> None:
    assert device_of_targets({}) == HOST
    assert device_of_targets({"a": torch.zeros(1)}) == HOST
    assert device_of_targets({"a": torch.zeros(1), "b": torch.zeros(1, device="meta")}) == torch.device(
        "meta"
    )
