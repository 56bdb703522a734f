"""What a memory profile counts of storage and network."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

import shardwise as sw
from shardwise.profiling import Traffic, traffic
from shardwise.profiling.columns import NOT_READ, ReadingColumns
from shardwise.profiling.traffic import TrafficReader, span_traffic

MIB = 1 << 20
COUNT_BYTES = 8 * MIB
SLACK_BYTES = MIB  # other processes of the machine receive as well

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs Linux's /proc")


@needs_proc
def test_what_a_phase_reads_is_counted_in_it_and_in_no_other(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(COUNT_BYTES))
    # No sample falls into the phases: their ends alone must do.
    with sw.profile_memory("cpu", interval_seconds=100.0) as profile:
        with sw.phase("read"), path.open("rb", buffering=0) as file:
            assert len(file.read()) == COUNT_BYTES
        with sw.phase("after"):
            pass
    read, after = (profile.traffic_between(span.start_seconds, span.stop_seconds) for span in profile.phases)
    assert read.read_bytes is not None
    assert after.read_bytes is not None
    assert COUNT_BYTES <= read.read_bytes <= COUNT_BYTES + SLACK_BYTES
    assert after.read_bytes <= SLACK_BYTES
    assert profile.traffic.read_bytes is not None
    assert profile.traffic.read_bytes >= read.read_bytes


@needs_proc
def test_what_comes_over_a_socket_is_received() -> None:
    with (
        sw.profile_memory("cpu", interval_seconds=100.0) as profile,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        sender = threading.Thread(target=_send, args=(server.getsockname(),))
        sender.start()
        server.settimeout(30)
        connection, _ = server.accept()
        with connection:
            connection.settimeout(30)
            left = COUNT_BYTES
            while left:
                left -= len(connection.recv(left))
        sender.join(30)
    assert profile.traffic.received_bytes is not None
    assert profile.traffic.received_bytes >= COUNT_BYTES


def _send(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(bytes(COUNT_BYTES))


def test_counters_are_taken_from_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io = tmp_path / "io"
    io.write_text(
        "rchar: 11\nwchar: 12\nsyscr: 13\nsyscw: 14\nread_bytes: 15\nwrite_bytes: 16\ncancelled_write_bytes: 17\n"
    )
    network = tmp_path / "dev"
    network.write_text(
        "Inter-|   Receive                            |  Transmit\n"
        " face |bytes    packets errs drop fifo frame |bytes    packets\n"
        "    lo:     100       1    0    0    0     0      999       1\n"
        "  eth0:1000000000000 1    0    0    0     0      999       1\n"
    )
    monkeypatch.setattr(traffic, "IO_PATH", str(io))
    monkeypatch.setattr(traffic, "NETWORK_PATH", str(network))
    reader = TrafficReader()
    assert reader.read() == (15.0, 11.0, 1000000000100.0)
    reader.close()
    reader.close()


def test_without_counters_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "IO_PATH", str(tmp_path / "no io"))
    monkeypatch.setattr(traffic, "NETWORK_PATH", str(tmp_path / "no dev"))
    with sw.profile_memory("cpu") as profile:
        pass
    assert profile.traffic == Traffic(fetched_bytes=None, read_bytes=None, received_bytes=None)
    assert "received" not in profile.measures
    assert "read_bytes" not in profile.to_json()


def test_a_span_counts_from_the_reading_before_its_start_to_the_one_before_its_end() -> None:
    columns = ReadingColumns(most_rows=16)
    for seconds, read in ((0.0, 100.0), (1.0, 130.0), (1.5, NOT_READ), (2.0, 190.0), (3.0, 200.0)):
        columns.append((seconds, *[0.0] * 3, *[NOT_READ] * 5, read, NOT_READ))
    found = span_traffic(columns, start_seconds=1.2, stop_seconds=2.5)
    assert found == Traffic(fetched_bytes=None, read_bytes=60, received_bytes=None)
    assert (
        span_traffic(columns, start_seconds=1.0, stop_seconds=3.0).read_bytes == 70
    )  # a reading at an end counts
