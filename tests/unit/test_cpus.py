"""CPUs that a process may use, those near a device, and the threads that follow: from files of a system that is written here."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shardwise.errors import ConfigurationError
from shardwise.materialization.cpus import (
    cpus_near,
    cpus_of_node,
    device_read_threads,
    keep_to,
    near_of,
    parsed_cpus,
    usable_cpus,
    usable_of,
)
from shardwise.materialization.reader_threads import ReaderThreads

linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@linux
def test_a_cgroup_around_the_process_limits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert usable_cpus(tmp_path) == 12
    write(tmp_path / "proc/self/cgroup", "0::/job/step\n")
    write(tmp_path / "sys/fs/cgroup/job/step/cpu.max", "max 100000\n")
    assert usable_cpus(tmp_path) == 12
    write(tmp_path / "sys/fs/cgroup/job/cpu.max", "350000 100000\n")  # of the group above
    assert usable_cpus(tmp_path) == 4
    write(tmp_path / "sys/fs/cgroup/cpu.max", "50000 100000\n")
    assert usable_cpus(tmp_path) == 1


@linux
def test_a_limit_counts_where_threads_keep_to_some_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert usable_of(None, tmp_path) == 12
    assert usable_of(frozenset(range(6)), tmp_path) == 6
    write(tmp_path / "sys/fs/cgroup/cpu.max", "350000 100000\n")
    assert usable_of(None, tmp_path) == usable_of(frozenset(range(6)), tmp_path) == 4
    assert usable_of(frozenset({3}), tmp_path) == 1


@linux
def test_the_first_version_of_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    write(tmp_path / "proc/self/cgroup", "5:memory:/\n4:cpu,cpuacct:/job\n0::/other/group\n")
    write(tmp_path / "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000\n")
    assert usable_cpus(tmp_path) == 12
    write(tmp_path / "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "200000\n")
    assert usable_cpus(tmp_path) == 2


@pytest.mark.parametrize(
    ("cpus", "of_node", "environ", "threads"),
    [
        (16, 16, {}, 16),
        (64, 64, {}, 16),
        (1, 1, {}, 2),
        (16, 16, {"LOCAL_WORLD_SIZE": "4"}, 4),
        (16, 16, {"LOCAL_WORLD_SIZE": "many"}, 16),
        (16, 16, {"SHARDWISE_READ_THREADS": "5", "LOCAL_WORLD_SIZE": "4"}, 5),
        (16, 16, {"SHARDWISE_READ_THREADS": " "}, 16),
        (14, 112, {"LOCAL_WORLD_SIZE": "8"}, 14),  # each rank is bound to CPUs of its own
        (56, 112, {"LOCAL_WORLD_SIZE": "8"}, 14),  # to those of one half of the machine, as three others are
        (8, 112, {"LOCAL_WORLD_SIZE": "8"}, 8),
    ],
)
def test_ranks_share_the_cpus(cpus: int, of_node: int, environ: dict[str, str], threads: int) -> None:
    assert device_read_threads(cpus=cpus, of_node=of_node, environ=environ) == threads


def test_the_cpus_of_all_ranks_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 112)
    assert cpus_of_node(tmp_path) == 112
    write(tmp_path / "proc/self/cgroup", "5:cpuset:/job\n0::/job/step\n")
    write(tmp_path / "sys/fs/cgroup/cpuset.cpus.effective", "0-111\n")
    write(tmp_path / "sys/fs/cgroup/job/cpuset.cpus.effective", "0-27,56-83\n")
    write(tmp_path / "sys/fs/cgroup/job/step/cpuset.cpus.effective", "\n")
    assert cpus_of_node(tmp_path) == 56
    write(tmp_path / "sys/fs/cgroup/cpuset/job/cpuset.effective_cpus", "0-15\n")  # the first version
    assert cpus_of_node(tmp_path) == 16
    write(tmp_path / "sys/fs/cgroup/job/cpu.max", "350000 100000\n")
    assert cpus_of_node(tmp_path) == 4


def test_a_number_of_threads_that_is_none() -> None:
    with pytest.raises(
        ConfigurationError, match="SHARDWISE_READ_THREADS: expected a whole number above 0, got 'all'"
    ):
        device_read_threads(cpus=4, of_node=4, environ={"SHARDWISE_READ_THREADS": "all"})


def test_lists_of_cpus() -> None:
    assert parsed_cpus("0-3,8\n") == {0, 1, 2, 3, 8}
    assert parsed_cpus("\n") == frozenset()
    with pytest.raises(ValueError):
        parsed_cpus("some")
    assert near_of(frozenset({0, 1}), frozenset({1, 2})) == {1}
    assert near_of(frozenset({0, 1}), frozenset({0, 1})) is None  # nothing to choose
    assert near_of(frozenset({7}), frozenset({0, 1})) is None


@linux
def test_the_system_says_which_are_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xDC, pci_device_id=0)
    module = SimpleNamespace(get_device_properties=lambda _: properties)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    device = torch.device("cuda", 1)
    assert cpus_near(device, tmp_path) is None
    write(tmp_path / "sys/bus/pci/devices/0000:dc:00.0/local_cpulist", "2-5\n")
    assert cpus_near(device, tmp_path) == {2, 3}
    del module.get_device_properties
    assert cpus_near(device, tmp_path) is None


@linux
def test_threads_keep_to_their_cpus_and_leave_the_others_alone() -> None:
    before = os.sched_getaffinity(0)
    one = frozenset({min(before)})
    threads = ReaderThreads(1, name="shardwise-read", cpus=one)
    assert threads.submit(os.sched_getaffinity, 0).result(timeout=60) == one
    threads.close(within_seconds=60)
    keep_to(None)
    assert os.sched_getaffinity(0) == before
