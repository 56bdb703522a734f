"""The memory sampler, its phases, and the load report."""

from __future__ import annotations

import json
import math
import mmap
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shardwise.errors import ConfigurationError
from shardwise.profiling import (
    LoadReport,
    MemoryProfile,
    RankReport,
    Timeline,
    node_increase,
    node_peak_bytes,
    phase,
    profile_memory,
    readings,
    row_reader,
)
from shardwise.profiling.columns import FIELDS, NOT_READ, ReadingColumns, Row, reading_of, span_peaks
from shardwise.profiling.pace import CostPace, handing_over_seconds, next_sample_seconds

MIB = 1 << 20
TOUCHED_BYTES = 64 * MIB
SLACK_BYTES = 8 * MIB

pytestmark = pytest.mark.usefixtures("nothing_is_collected")
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's /proc")


def touch(count_bytes: int) -> mmap.mmap:
    """Return fresh anonymous pages, each written, that go back to the system when closed."""
    pages = mmap.mmap(-1, count_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    np.frombuffer(pages, dtype=np.uint8)[:: mmap.PAGESIZE] = 1
    return pages


def wait_for_samples(profile: MemoryProfile) -> None:
    """Wait until the thread has read twice more; a busy machine may be late."""
    wanted = len(profile.readings) + 2
    deadline = time.monotonic() + 60
    while len(profile.readings) < wanted and time.monotonic() < deadline:
        time.sleep(0.005)


def sampler_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shardwise-memory-profile"]


# -- host memory


@needs_proc
def test_memory_touched_in_a_phase_is_the_anonymous_peak() -> None:
    with profile_memory("cpu") as profile, profile.phase("touch"):
        pages = touch(TOUCHED_BYTES)
        wait_for_samples(profile)  # what comes and goes between two is not seen
        pages.close()
    assert profile.anon_peak_bytes + SLACK_BYTES >= TOUCHED_BYTES
    assert profile.anon_peak_bytes <= TOUCHED_BYTES + SLACK_BYTES


@needs_proc
def test_memory_held_at_a_phase_end_is_seen_without_any_sample() -> None:
    with profile_memory("cpu", interval_seconds=100.0) as profile:
        with profile.phase("touch"):
            pages = touch(TOUCHED_BYTES)
        pages.close()
    assert abs(profile.anon_peak_bytes - TOUCHED_BYTES) <= SLACK_BYTES
    assert len(profile.readings) == 4  # start, phase start, phase stop, stop


@needs_proc
def test_peak_is_limited_to_a_span() -> None:
    with profile_memory("cpu") as profile:
        with profile.phase("quiet"):
            wait_for_samples(profile)
        with profile.phase("loud"):
            pages = touch(TOUCHED_BYTES)
            wait_for_samples(profile)
        pages.close()
        with profile.phase("after"):
            wait_for_samples(profile)
    peaks = {
        span.name: profile.peak_between(span.start_seconds, span.stop_seconds).anon_peak_bytes
        for span in profile.phases
    }
    assert peaks["quiet"] <= SLACK_BYTES
    assert abs(peaks["loud"] - TOUCHED_BYTES) <= SLACK_BYTES
    assert peaks["after"] <= SLACK_BYTES


@needs_proc
def test_mapped_file_counts_as_file_bytes_and_not_as_anonymous(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\1" * TOUCHED_BYTES)
    with profile_memory("cpu") as profile, path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert (
            int(np.frombuffer(pages, dtype=np.uint8)[:: mmap.PAGESIZE].sum())
            == TOUCHED_BYTES // mmap.PAGESIZE
        )
        with profile.phase("mapped"):
            pass
        pages.close()
    # In a folder that is a tmpfs the pages are shared ones.
    mapped_bytes = max(profile.file_peak_bytes, profile.shared_peak_bytes)
    assert abs(mapped_bytes - TOUCHED_BYTES) <= SLACK_BYTES
    assert profile.anon_peak_bytes <= SLACK_BYTES


@needs_proc
def test_what_is_read_often_is_what_is_read_and_shared_memory_is_told_apart_at_the_next_full_reading() -> (
    None
):
    reader = readings.ProcReader(proportional=False)
    anon, _, shared = reader.read()
    own, common = touch(TOUCHED_BYTES), mmap.mmap(-1, TOUCHED_BYTES // 2, flags=mmap.MAP_SHARED)
    np.frombuffer(common, dtype=np.uint8)[:: mmap.PAGESIZE] = 1
    often, full = reader.read_often(), reader.read()
    assert often[0] - anon == pytest.approx(TOUCHED_BYTES, abs=SLACK_BYTES)
    assert often[2] == shared
    assert full[2] - shared == pytest.approx(TOUCHED_BYTES // 2, abs=SLACK_BYTES)
    assert often[1] - full[1] == pytest.approx(TOUCHED_BYTES // 2, abs=SLACK_BYTES)
    assert reader.read_often() == pytest.approx(reader.read(), abs=SLACK_BYTES)
    own.close()
    common.close()
    reader.close()
    reader.close()
    with pytest.raises(OSError, match="/proc/self/statm"):
        reader.read_often()


@needs_proc
def test_pss_is_read_at_both_ends_and_at_a_phases_where_it_is_affordable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The figures are played: a real one falls when another process begins to map the same libraries."""
    assert readings.host_reader().read_pss() > 16 * MIB  # of this process, by the kernel
    rollup = tmp_path / "smaps_rollup"
    monkeypatch.setattr(readings, "ROLLUP_PATH", str(rollup))
    monkeypatch.setattr(row_reader, "_PHASE_SHARE", math.inf)  # every reading is affordable
    rollup.write_text(f"Rss: 1 kB\nPss: {100 * 1024} kB\nPss_Anon: 2 kB\n")
    with profile_memory("cpu", interval_seconds=100.0) as profile:
        rollup.write_text(f"Rss: 1 kB\nPss: {164 * 1024} kB\nPss_Anon: 2 kB\n")
        with profile.phase("held"):
            pass
        rollup.write_text(f"Rss: 1 kB\nPss: {107 * 1024} kB\nPss_Anon: 2 kB\n")
    assert [reading.pss_bytes for reading in profile.readings] == [
        mebibytes * MIB for mebibytes in (100, 164, 164, 107)
    ]
    assert profile.pss_peak_bytes == 64 * MIB


def test_peaks_are_never_negative() -> None:
    pages = touch(TOUCHED_BYTES)
    with profile_memory("cpu") as profile:
        pages.close()
    assert 0 <= profile.anon_peak_bytes <= SLACK_BYTES
    assert 0 <= profile.file_peak_bytes <= SLACK_BYTES
    assert profile.device_peak_bytes == 0


def test_readings_are_in_order_and_at_the_pace_asked_for() -> None:
    with profile_memory("cpu", interval_seconds=0.02) as profile:
        time.sleep(0.2)
        wait_for_samples(profile)
    seconds = [reading.seconds for reading in profile.readings]
    assert seconds == sorted(seconds)
    assert profile.readings[0] == profile.baseline  # at once, and not after an interval
    assert 0.2 <= seconds[-1] <= profile.seconds
    assert 4 <= len(seconds) <= profile.seconds / 0.02 + 2  # a late reading is not made up


def test_a_reading_that_the_system_refuses_is_counted_and_the_next_is_taken() -> None:
    profile = MemoryProfile(device="cpu", interval_seconds=100.0)
    profile.start()
    read = profile._reader._host.read
    profile._reader._host = SimpleNamespace(
        read=_refuse, read_often=_refuse, read_pss=lambda: None, close=lambda: None
    )  # type: ignore[assignment]
    with profile.phase("refused"):
        pass
    profile._reader._host = SimpleNamespace(
        read=read, read_often=read, read_pss=lambda: None, close=lambda: None
    )  # type: ignore[assignment]
    profile.stop()
    assert profile.skipped_readings == 2
    assert len(profile.readings) == 2


def _refuse() -> tuple[int, int, int]:
    raise OSError("too many open files")


# -- the thread


def test_thread_is_a_daemon_and_gone_after_exit() -> None:
    before = len(sampler_threads())
    with profile_memory("cpu"):
        assert len(sampler_threads()) == before + 1
        assert all(thread.daemon for thread in sampler_threads())
    assert len(sampler_threads()) == before


def test_thread_is_gone_and_figures_stay_after_an_exception() -> None:
    before = len(sampler_threads())
    kept: list[MemoryProfile] = []

    def fail() -> None:
        with profile_memory("cpu") as profile:
            kept.append(profile)
            with profile.phase("outer"), phase("inner"):
                raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail()
    assert len(sampler_threads()) == before
    assert [span.name for span in kept[0].phases] == ["outer", "inner"]
    with phase("later"):
        pass
    assert [span.name for span in kept[0].phases] == ["outer", "inner"]


def test_start_twice_is_refused_and_stop_twice_is_not() -> None:
    profile = MemoryProfile(device="cpu", interval_seconds=0.01)
    profile.start()
    with pytest.raises(ConfigurationError, match="expected one start"):
        profile.start()
    profile.stop()
    seconds = profile.seconds
    profile.stop()
    assert profile.seconds == seconds


@pytest.mark.parametrize("interval", [0.0, -1.0, math.nan, math.inf])
def test_impossible_interval_is_refused(interval: float) -> None:
    with (
        pytest.raises(ConfigurationError, match="expected interval_seconds above 0"),
        profile_memory(None, interval),
    ):
        pass


def test_a_profile_that_was_not_started_is_refused() -> None:
    profile = MemoryProfile(device="cpu", interval_seconds=0.01)
    with pytest.raises(ConfigurationError, match=r"Call start\(\) first"):
        _ = profile.baseline
    with pytest.raises(ConfigurationError, match="not started"), profile.phase("early"):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_opens_phases_without_waiting_for_the_sampler() -> None:
    with profile_memory("cpu") as profile:
        with profile._lock:  # as if the sampler held it at the fork
            child = os.fork()
            if child == 0:
                thread = threading.Thread(target=lambda: phase("in the child").__enter__(), daemon=True)
                thread.start()
                thread.join(60)
                os._exit(1 if thread.is_alive() else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- phases


def test_phases_nest_with_depth_and_order_of_start() -> None:
    with profile_memory("cpu") as profile, profile.phase("outer"):
        with phase("first"):
            time.sleep(0.01)
        with phase("second"), phase("inside"):
            pass
    assert [(span.name, span.depth) for span in profile.phases] == [
        ("outer", 0),
        ("first", 1),
        ("second", 1),
        ("inside", 2),
    ]
    outer, first = profile.phases[:2]
    assert outer.start_seconds <= first.start_seconds <= first.stop_seconds <= outer.stop_seconds
    assert first.stop_seconds - first.start_seconds >= 0.01


def test_phase_is_noted_by_every_active_profile_and_by_none_without_one() -> None:
    with phase("before"):
        pass
    with profile_memory("cpu") as outer:
        with profile_memory("cpu") as inner, phase("both"):
            pass
        with phase("outer only"):
            pass
    assert [span.name for span in outer.phases] == ["both", "outer only"]
    assert [span.name for span in inner.phases] == ["both"]


def test_phase_still_open_at_the_end_is_closed_there() -> None:
    profile = MemoryProfile(device="cpu", interval_seconds=0.01)
    profile.start()
    with profile.phase("open"):
        profile.stop()
    (span,) = profile.phases
    assert span.stop_seconds <= profile.seconds
    with profile.phase("too late"):
        pass
    assert len(profile.phases) == 1


def test_phase_seconds_add_up_and_count_a_name_inside_itself_once() -> None:
    with profile_memory("cpu") as profile:
        for _ in range(2):
            with phase("read"), phase("read"):
                time.sleep(0.02)
    total = sum(span.stop_seconds - span.start_seconds for span in profile.phases if span.depth == 0)
    assert profile.phase_seconds() == {"read": pytest.approx(total)}


def test_empty_phase_name_is_refused() -> None:
    with (
        profile_memory("cpu") as profile,
        pytest.raises(ConfigurationError, match="got an empty name"),
        profile.phase(""),
    ):
        pass


# -- without /proc


def test_without_proc_the_highest_resident_size_is_given_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "STATUS_PATH", "/nonexistent/status")
    with profile_memory("cpu") as profile:
        pages = touch(TOUCHED_BYTES)
    pages.close()
    assert "ru_maxrss" in profile.measures
    assert "never falls" in profile.to_json()["measures"]
    assert profile.baseline.anon_bytes > 16 * MIB
    assert profile.baseline.file_bytes == 0
    assert profile.pss_peak_bytes is None
    values = [reading.anon_bytes for reading in profile.readings]
    assert values == sorted(values)


def test_status_without_the_three_fields_is_not_taken_for_zero(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmRSS:\t  1024 kB\n")
    monkeypatch.setattr(readings, "STATUS_PATH", str(status))
    assert isinstance(readings.host_reader(), readings.HighWaterReader)


@needs_proc
def test_without_smaps_rollup_there_is_no_pss_and_measures_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "ROLLUP_PATH", "/nonexistent/smaps_rollup")
    with profile_memory("cpu") as profile:
        pass
    assert profile.pss_peak_bytes is None
    assert "no Pss" in profile.measures
    assert profile.to_json()["pss_bytes"] == [None] * len(profile.readings)


def test_status_is_parsed_in_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("VmRSS:\t 9 kB\nRssAnon:\t     116 kB\nRssFile:\t    1616 kB\nRssShmem:\t       3 kB\n")
    monkeypatch.setattr(readings, "STATUS_PATH", str(status))
    reader = readings.host_reader()
    assert reader.read() == (116 * 1024, 1616 * 1024, 3 * 1024)
    reader.close()
    with pytest.raises(OSError, match="descriptor"):
        reader.read()


# -- device


class FakeDevice:
    """An allocator's statistics under the names that torch's accelerator modules use."""

    def __init__(self) -> None:
        self.allocated = 10 * MIB
        self.highest = 50 * MIB

    def allocate(self, count_bytes: int) -> None:
        self.allocated += count_bytes
        self.highest = max(self.highest, self.allocated)

    def memory_allocated(self, device: torch.device) -> int:
        return self.allocated

    def memory_reserved(self, device: torch.device) -> int:
        return self.allocated + MIB

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.highest

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.highest = self.allocated


class FakeDeviceWithStats(FakeDevice):
    """The same, with one call that gives all of them."""

    def memory_stats(self, device: torch.device) -> dict[str, int]:
        return {
            "allocated_bytes.all.current": self.allocated,
            "allocated_bytes.all.peak": self.highest,
            "reserved_bytes.all.current": self.allocated + MIB,
        }


@pytest.fixture(params=[FakeDevice, FakeDeviceWithStats])
def fake_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = request.param()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return module


def test_device_peak_between_two_readings_is_seen_by_phase(fake_device: FakeDevice) -> None:
    with profile_memory("xpu", interval_seconds=100.0) as profile:
        with profile.phase("short"):
            fake_device.allocate(300 * MIB)
            fake_device.allocate(-300 * MIB)
        with profile.phase("kept"):
            fake_device.allocate(100 * MIB)
    short, kept = (profile.peak_between(span.start_seconds, span.stop_seconds) for span in profile.phases)
    assert profile.baseline.device_allocated_bytes == 10 * MIB
    assert profile.baseline.device_reserved_bytes == 11 * MIB
    assert short.device_peak_bytes == 300 * MIB
    assert kept.device_peak_bytes == 100 * MIB
    assert profile.device_peak_bytes == 300 * MIB
    assert max(profile.to_json()["device_bytes"]) == 310 * MIB
    assert "xpu" in profile.measures


def test_an_inner_profile_does_not_hide_a_device_peak_from_the_outer(fake_device: FakeDevice) -> None:
    with profile_memory("xpu", interval_seconds=100.0) as outer:
        fake_device.allocate(300 * MIB)
        fake_device.allocate(-300 * MIB)
        with profile_memory("xpu", interval_seconds=100.0) as inner:
            fake_device.allocate(20 * MIB)
            fake_device.allocate(-20 * MIB)
    assert outer.device_peak_bytes == 300 * MIB
    assert inner.device_peak_bytes == 20 * MIB


def test_cpu_has_no_device_figures() -> None:
    with profile_memory(torch.device("cpu")) as profile:
        pass
    assert profile.baseline.device_allocated_bytes is None
    assert profile.to_json()["device_bytes"] == [None] * len(profile.readings)
    assert "device" not in profile.measures


# -- columns and pace


def row(seconds: float, anon_bytes: float, pss_bytes: float = NOT_READ) -> Row:
    return (seconds, anon_bytes, 0.0, 0.0, pss_bytes, *[NOT_READ] * 6)


def test_full_columns_halve_their_resolution_and_keep_each_peak() -> None:
    columns = ReadingColumns(most_rows=8)
    merged = [
        columns.append(row(float(i), 5.0 if i == 4 else 1.0, 7.0 if i == 3 else NOT_READ)) for i in range(9)
    ]
    assert merged == [False] * 8 + [True]
    assert len(columns) == 5
    assert columns.seconds().tolist() == [1.0, 3.0, 5.0, 7.0, 8.0]
    assert columns.values("anon_bytes").tolist() == [1.0, 1.0, 5.0, 1.0, 1.0]
    assert [reading.pss_bytes for reading in columns.rows()] == [None, 7, None, None, None]


def test_span_without_a_reading_has_the_last_value_before_it() -> None:
    columns = ReadingColumns(most_rows=8)
    for values in (row(0.0, 1.0), row(1.0, 9.0), row(2.0, 4.0)):
        columns.append(values)
    peaks = span_peaks(columns, baseline=reading_of(row(0.0, 1.0)), start_seconds=1.2, stop_seconds=1.8)
    assert peaks.anon_peak_bytes == 8
    assert peaks.pss_peak_bytes is None


def test_a_span_that_ends_before_it_starts_is_refused() -> None:
    with profile_memory("cpu") as profile:
        pass
    with pytest.raises(ConfigurationError, match="ends after its start"):
        profile.peak_between(2.0, 1.0)


def test_every_field_of_a_row_comes_back_under_its_name() -> None:
    reading = reading_of((0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0))
    assert reading.seconds == 0.5
    assert [getattr(reading, name) for name in FIELDS] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_costly_readings_keep_to_their_share() -> None:
    pace = CostPace(share=0.01, gap_seconds=0.2)
    assert pace.is_wanted(0.0)
    pace.spent(now_seconds=1.0, cost_seconds=0.001)
    assert not pace.is_wanted(1.15)
    assert pace.is_affordable(1.15, share=0.01)
    assert not pace.is_affordable(1.05, share=0.01)
    assert pace.is_affordable(1.05, share=0.1)
    assert pace.is_wanted(1.25)
    pace.spent(now_seconds=2.0, cost_seconds=0.01)
    assert not pace.is_wanted(2.9)
    assert pace.is_wanted(3.01)


@pytest.mark.parametrize(
    ("now", "thread", "expected"),
    [
        (1.004, 0.001, 1.01),  # cheap: the next point of the grid
        (1.034, 0.001, 1.04),  # late: what was missed is not made up
        (1.004, 0.0102, 1.02),  # above its share: waits until it is not
        (1.004, 0.5, 1.084),  # far above: still eight intervals at most
    ],
)
def test_samples_keep_to_the_grid_and_the_thread_to_its_share(
    now: float, thread: float, expected: float
) -> None:
    due = next_sample_seconds(now_seconds=now, interval_seconds=0.01, thread_seconds=thread, share=0.01)
    assert due == pytest.approx(expected)


@pytest.mark.parametrize(
    ("late_ms", "loses"), [(0.1, False), (4.0, False), (5.2, True), (7.4, True), (9.0, False), (50.0, False)]
)
def test_a_sample_for_which_the_interpreter_lock_was_handed_over_is_seen_by_its_lateness(
    late_ms: float, loses: bool
) -> None:
    assert (handing_over_seconds(late_ms / 1000, switch_seconds=0.005) > 0) == loses


# -- timelines of several ranks


def timeline(rank: int, started: float, seconds: list[float], anon: list[float]) -> Timeline:
    document = {
        "rank": rank,
        "measures": "host",
        "started_at_seconds": started,
        "seconds": seconds,
        "anon_bytes": [100 + value for value in anon],
        "file_bytes": [0] * len(anon),
        "pss_bytes": [None] * len(anon),
        "device_bytes": [None] * len(anon),
        "phases": [{"name": "load", "depth": 0, "start_seconds": 0.0, "stop_seconds": seconds[-2]}],
        "baseline": {"anon_bytes": 100, "file_bytes": 0, "pss_bytes": None, "device_bytes": None},
    }
    return Timeline.from_json(document)


def test_ranks_are_summed_at_equal_wall_clock_instants() -> None:
    first = timeline(0, 1000.0, [0.0, 1.0, 2.0, 3.0], [0, 10, 0, 0])
    second = timeline(1, 1001.5, [0.0, 1.0, 2.0], [0, 10, 50])  # its 10 comes when rank 0 has let go
    instants, total = node_increase((first, second), "anon_bytes")
    assert instants.tolist() == [0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert total.tolist() == [0, 10, 10, 0, 10, 10, 50]
    assert node_peak_bytes((first, second), "anon_bytes", until=("load",)) == 10
    assert node_peak_bytes((first, second), "anon_bytes", until=("none",)) == 50
    assert node_peak_bytes((first, second), "pss_bytes", until=("load",)) is None
    assert node_peak_bytes((), "anon_bytes", until=("load",)) is None


def test_profile_json_is_plain_and_reads_back_as_a_timeline() -> None:
    with profile_memory("cpu") as profile, phase("load"):
        pages = touch(MIB)
    pages.close()
    document = json.loads(json.dumps(profile.to_json(), allow_nan=False))
    line = Timeline.from_json({**document, "rank": 3})
    assert line.rank == 3
    assert line.phases == tuple(profile.phases)
    assert line.peak_bytes("anon_bytes", until_seconds=math.inf) == profile.anon_peak_bytes
    assert {"seconds", "anon_bytes", "file_bytes", "pss_bytes", "device_bytes"} <= set(document)
    with pytest.raises(ConfigurationError, match="expected the key 'rank'"):
        Timeline.from_json(document)


# -- load report


def rank_report(**changes: Any) -> RankReport:
    values: dict[str, Any] = {
        "rank": 0,
        "node": "host",
        "host_anon_peak_bytes": 1,
        "device_peak_bytes": 0,
        "shard_bytes": 2,
        "storage_bytes": 3,
        "network_bytes": 4,
        "retried_reads": 0,
        "seconds": 0.5,
    }
    return RankReport(**{**values, **changes})


def load_report(**changes: Any) -> LoadReport:
    values: dict[str, Any] = {
        "model": "org/model",
        "strategy": "native_fsdp",
        "route": "rank0",
        "route_reason": "it was asked for",
        "world_size": 2,
        "seconds": 1.5,
        "phases": {"from_pretrained": 1.0},
        "storage_bytes": 10,
        "network_bytes": 20,
        "predicted": {"storage_bytes": 10, "seconds": 1.25},
        "tensors": {"checkpoint": 3, "tied": 1},
        "origins": {"a": "checkpoint"},
        "converted": ("b",),
        "dtypes": {"stored": "bfloat16", "compute": "bfloat16", "reduce": "float32", "optimizer": None},
        "ranks": (rank_report(), rank_report(rank=1)),
    }
    return LoadReport(**{**values, **changes})


def test_load_report_in_words() -> None:
    report = load_report(
        phases={"read": 1.0, "check": 0.25, "plan": 0.5, "report": 0.125},
        storage_bytes=3 << 20,
        network_bytes=0,
        ranks=(rank_report(shard_bytes=2 << 20), rank_report(rank=1, host_anon_peak_bytes=5 << 20)),
    )
    assert str(report) == (
        "org/model: native_fsdp, route rank0 (it was asked for), 2 ranks, 1.50 s (longest phases: read 1.00, plan 0.50, "
        "check 0.25)\n"
        "worst rank: shard 2.0 MiB, peak of anonymous host memory 5.0 MiB, of device memory 0.0 MiB\n"
        "all ranks: 3.0 MiB read from storage, 0.0 MiB moved between ranks\n"
        "tensors: 3 checkpoint, 1 tied"
    )
    alone = load_report(world_size=1, ranks=(), tensors={})
    assert ", 1 rank, " in str(alone)
    assert str(alone).endswith("\ntensors: none")


def test_load_report_comes_back_equal_from_its_file(tmp_path: Path) -> None:
    report = load_report()
    path = tmp_path / "new" / "report.json"
    report.save(path)
    assert LoadReport.from_json(json.loads(path.read_text())) == report
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]
    assert list(report.to_json()) == [
        "schema",
        "model",
        "strategy",
        "route",
        "route_reason",
        "world_size",
        "seconds",
        "phases",
        "storage_bytes",
        "network_bytes",
        "predicted",
        "tensors",
        "origins",
        "converted",
        "dtypes",
        "ranks",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "shardwise.load_report/9"}, "expected schema"),
        ({"model": ""}, "expected model to be a text"),
        ({"world_size": 0}, "expected world_size of 1 or more"),
        ({"storage_bytes": -1}, "expected storage_bytes to be a whole number"),
        ({"network_bytes": 1.5}, "expected network_bytes to be a whole number"),
        ({"seconds": math.nan}, "expected seconds to be a number of 0 or more"),
        ({"phases": {"load": -1.0}}, r"expected phases\['load'\]"),
        ({"predicted": {"seconds": "1"}}, r"expected predicted\['seconds'\]"),
        ({"tensors": {"guessed": 1}}, "expected origins among"),
        ({"origins": {"a": "guessed"}}, "expected origins among"),
        ({"converted": (1,)}, "expected names of tensors in converted"),
        ({"dtypes": {"stored": "bfloat16"}}, "expected dtypes for"),
        ({"ranks": (rank_report(rank=2),)}, "expected each rank below 2"),
        ({"ranks": (rank_report(), rank_report())}, "at most once"),
    ],
)
def test_impossible_load_report_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_report(**changes)


@pytest.mark.parametrize(
    "changes", [{"rank": -1}, {"node": ""}, {"shard_bytes": True}, {"seconds": math.inf}]
)
def test_impossible_rank_report_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(changes))):
        rank_report(**changes)


def test_load_report_with_missing_or_unknown_keys_is_refused() -> None:
    document = load_report().to_json()
    with pytest.raises(ConfigurationError, match=r"missing: \['route'\]"):
        LoadReport.from_json({key: value for key, value in document.items() if key != "route"})
    with pytest.raises(ConfigurationError, match=r"unknown: \['extra'\]"):
        LoadReport.from_json({**document, "extra": 1})
