"""Memory and phases as a trace that Perfetto (https://ui.perfetto.dev) and Chrome's `about:tracing` open."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from shardwise.profiling import Figure, PhaseSpan, Timeline
from shardwise.profiling.whole_file import write_whole
from shardwise.report.documents import read_documents

_MICROSECONDS: Final = 1_000_000
_COUNTERS: Final[dict[Figure, str]] = {
    "anon_bytes": "host memory, anonymous",
    "file_bytes": "host memory, file-backed",
    "shared_bytes": "host memory, shared",
    "pss_bytes": "host memory, proportional set size",
    "device_bytes": "device memory, in tensors",
    "device_reserved_bytes": "device memory, reserved",
    "fetched_bytes": "fetched from storage",
    "read_bytes": "read",
    "received_bytes": "received by the machine",
}


def save_trace(documents: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write the timelines as a trace: a process for each rank of each mode, its phases as slices, its memory as counters.

    Each mode begins at 0, so that modes can be compared below each other; its ranks keep their distance in time.
    Counters are bytes above the start.

    Args:
        documents: See `read_documents`.
        path: File to write; an existing one is replaced, missing directories are made.

    Raises:
        ConfigurationError: The documents cannot be read.

    Source:
        "Trace Event Format" (Google, 2016): metadata (`M`), complete (`X`) and counter (`C`) events.
    """
    events: list[dict[str, Any]] = []
    process = 0
    for run in read_documents(documents).runs:
        lines = (*run.timelines, *run.step_timelines)
        origin = min((line.started_at_seconds for line in lines), default=0.0)
        for rank in sorted({line.rank for line in lines}):
            process += 1
            events += _names(f"{run.mode} rank {rank}", process=process)
            for line in lines:
                if line.rank == rank:
                    events += _events(line, process=process, offset_seconds=line.started_at_seconds - origin)
    document = {"traceEvents": events, "displayTimeUnit": "ms"}
    write_whole(path, json.dumps(document, allow_nan=False, separators=(",", ":")) + "\n")


def _events(line: Timeline, *, process: int, offset_seconds: float) -> Iterator[dict[str, Any]]:
    for lane, spans in enumerate(_lanes(line.phases)):
        # The thread that has the process's number is the main one, beside which a viewer lays the counters.
        thread = process if lane == 0 else process * 1000 + lane
        for span in spans:
            yield {
                "ph": "X",
                "name": span.name,
                "cat": "phase",
                "pid": process,
                "tid": thread,
                "ts": round((span.start_seconds + offset_seconds) * _MICROSECONDS),
                "dur": round((span.stop_seconds - span.start_seconds) * _MICROSECONDS),
            }
    for figure, name in _COUNTERS.items():
        before = math.nan
        for seconds, value in zip(line.seconds.tolist(), line.increases[figure].tolist(), strict=True):
            # A counter keeps its value until the next event.
            if not math.isnan(value) and value != before:
                before = value
                yield {
                    "ph": "C",
                    "name": name,
                    "pid": process,
                    "ts": round((seconds + offset_seconds) * _MICROSECONDS),
                    "args": {"bytes": int(value)},
                }


def _lanes(spans: Sequence[PhaseSpan]) -> list[list[PhaseSpan]]:
    """Put spans into lanes in which each lies inside another or beside it: a viewer draws no others."""
    lanes: list[list[PhaseSpan]] = []
    for span in sorted(spans, key=lambda span: (span.start_seconds, -span.stop_seconds)):
        for lane in lanes:
            around = [other for other in lane if other.stop_seconds > span.start_seconds]
            if all(other.stop_seconds >= span.stop_seconds for other in around):
                lane.append(span)
                break
        else:
            lanes.append([span])
    return lanes


def _names(name: str, *, process: int) -> Iterator[dict[str, Any]]:
    for kind, argument in (
        ("process_name", {"name": name}),
        ("process_sort_index", {"sort_index": process}),
        ("thread_name", {"name": "phases"}),
    ):
        yield {"ph": "M", "name": kind, "pid": process, "tid": process, "args": argument}
