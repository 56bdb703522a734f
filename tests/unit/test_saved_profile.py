"""A memory profile around anybody's code: its phases, its words, its file."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import shardwise as sw
from shardwise.profiling import PROFILE_SCHEMA, Timeline, readings

MIB = 1 << 20
TOUCHED_BYTES = 64 * MIB
SLACK_BYTES = 8 * MIB

pytestmark = pytest.mark.usefixtures("nothing_is_collected")
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's /proc")


# Maps the file, touches every page, says so, and waits until its input ends.
OTHER_PROCESS = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
touched = sum(pages[::mmap.PAGESIZE])
print(touched, flush=True)
sys.stdin.read()
"""


def pss_of_mapping(path: Path) -> int:
    """Return this process's part of a file's pages; that of all its memory changes with any process that maps the same libraries."""
    is_inside, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            is_inside = line.endswith(str(path.resolve()))
        elif first == "Pss:" and is_inside:
            found += int(rest[0]) * 1024
    return found


@needs_proc
def test_pages_that_two_processes_map_are_half_of_each_ones_pss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []  # by the kernel, of this process
    read_pss = readings._read_pss
    monkeypatch.setattr(readings, "_read_pss", lambda: told.append(read_pss() or 0) or told[-1])
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\1" * TOUCHED_BYTES)
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert int(other.stdout.readline()) == TOUCHED_BYTES // mmap.PAGESIZE
        with sw.profile_memory("cpu", interval_seconds=100.0) as profile, path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            assert np.frombuffer(pages, dtype=np.uint8)[:: mmap.PAGESIZE].all()
            profile.stop()
            own_bytes = pss_of_mapping(path)
            pages.close()
        assert other.stdin is not None
        other.stdin.close()
    # In a folder that is a tmpfs the pages are shared ones.
    mapped_bytes = max(profile.file_peak_bytes, profile.shared_peak_bytes)
    assert abs(mapped_bytes - TOUCHED_BYTES) <= SLACK_BYTES
    # Summed over both it is the file once: what the node's memory really holds.
    assert abs(own_bytes - TOUCHED_BYTES / 2) <= SLACK_BYTES
    _, start, stop = told  # the first reading shows that there is such a figure
    assert profile.pss_peak_bytes == max(0, stop - start)


@needs_proc
def test_shared_memory_stands_apart() -> None:
    with sw.profile_memory("cpu", interval_seconds=100.0) as profile:
        pages = mmap.mmap(-1, TOUCHED_BYTES, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        np.frombuffer(pages, dtype=np.uint8)[:: mmap.PAGESIZE] = 1
        with sw.phase("held"):
            pass
        pages.close()
    assert abs(profile.shared_peak_bytes - TOUCHED_BYTES) <= SLACK_BYTES
    assert profile.anon_peak_bytes <= SLACK_BYTES
    assert profile.file_peak_bytes <= SLACK_BYTES


def test_phases_of_code_that_does_not_know_the_profile_nest_in_its_own() -> None:
    def anybody() -> None:
        with sw.phase("read"), sw.phase("decode"):
            pass

    with sw.profile_memory("cpu") as profile, sw.phase("load"):
        anybody()
    assert [(span.name, span.depth) for span in profile.phases] == [("load", 0), ("read", 1), ("decode", 2)]
    lines = str(profile).splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["phase", "all", "load", "read", "decode"]
    assert lines[4].startswith(" " * 6 + "decode")


def test_words_have_the_figures_of_each_phase() -> None:
    pages = mmap.mmap(-1, TOUCHED_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with sw.profile_memory("cpu", interval_seconds=100.0) as profile:
        with sw.phase("quiet"):
            pass
        with sw.phase("loud"):
            np.frombuffer(pages, dtype=np.uint8)[:: mmap.PAGESIZE] = 1
    pages.close()
    header, whole, quiet, loud, *_ = (line.split() for line in str(profile).splitlines())
    anon = header.index("anon")
    assert float(quiet[anon]) < 8
    assert abs(float(loud[anon]) - 64) < 8
    assert float(whole[anon]) >= float(loud[anon])


def test_words_of_a_profile_that_was_not_started() -> None:
    assert "not started" in str(sw.MemoryProfile(device="cpu", interval_seconds=0.01))


@pytest.mark.parametrize(("environment", "given", "expected"), [("3", None, 3), ("3", 5, 5), ("", None, 0)])
def test_a_saved_profile_knows_its_rank_and_reads_back(
    environment: str, given: int | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", environment)
    with sw.profile_memory("cpu") as profile, sw.phase("work"):
        pass
    path = tmp_path / "new" / "rank.json"
    profile.save(path, rank=given)
    document = json.loads(path.read_text())
    assert document["schema"] == PROFILE_SCHEMA
    assert document["rank"] == expected
    assert document["node"]
    line = Timeline.from_json(document)
    assert line.rank == expected
    assert [span.name for span in line.phases] == ["work"]
    assert [file.name for file in path.parent.iterdir()] == ["rank.json"]


def test_a_timeline_of_an_earlier_version_has_no_figures_of_traffic() -> None:
    with sw.profile_memory("cpu") as profile:
        pass
    document = {
        name: value
        for name, value in profile.to_json().items()
        if name not in ("shared_bytes", "fetched_bytes", "read_bytes", "received_bytes")
    }
    line = Timeline.from_json({**document, "rank": 0})
    assert line.peak_bytes("received_bytes", until_seconds=10.0) is None
    assert line.peak_bytes("anon_bytes", until_seconds=10.0) is not None
