"""What can be shown: a comparison, the report of one load, or the memory profiles of some ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardwise.errors import ConfigurationError
from shardwise.profiling import PROFILE_SCHEMA, Figure, LoadReport, Timeline, node_peak_bytes
from shardwise.profiling.load_report import SCHEMA as LOAD_SCHEMA
from shardwise.report.comparison import SCHEMA as COMPARISON_SCHEMA
from shardwise.report.comparison import (
    HostPeaks,
    Run,
    counted_ranks,
    model_name,
    ranks_in_words,
    read_comparison,
)

PROFILES_MODE = "memory profile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What is shown of some documents.

    Args:
        title: What was measured, for people.
        runs: One per mode.
        comparison: The document of a comparison; None for others.
    """

    title: str
    runs: tuple[Run, ...]
    comparison: Mapping[str, Any] | None


def read_documents(documents: Sequence[Mapping[str, Any]]) -> Shown:
    """Read one comparison, one load report, or the memory profiles of any number of ranks.

    Args:
        documents: What `shardwise compare`, `LoadReport.save` or `MemoryProfile.save` wrote.

    Raises:
        ConfigurationError: There is none, one cannot be read, or they do not belong together.
    """
    schemas = [document.get("schema") for document in documents]
    if schemas == [COMPARISON_SCHEMA]:
        runs = read_comparison(documents[0])
        counted = counted_ranks(documents[0], runs)
        return Shown(
            title=f"Loading {model_name(documents[0])}{_on(counted)}",
            runs=runs,
            comparison=documents[0],
        )
    if schemas == [LOAD_SCHEMA]:
        report = LoadReport.from_json(documents[0])
        name = model_name({"model": report.model})
        return Shown(
            title=f"Loading {name}{_on(ranks_in_words(report.world_size))}",
            runs=(_run_of_report(report),),
            comparison=None,
        )
    if schemas and set(schemas) == {PROFILE_SCHEMA}:
        run = _run_of_profiles(documents)
        return Shown(title=f"Memory{_on(ranks_in_words(run.world_size))}", runs=(run,), comparison=None)
    raise ConfigurationError(
        f"report: expected one document of {COMPARISON_SCHEMA} or {LOAD_SCHEMA}, or some of {PROFILE_SCHEMA}, got "
        f"{schemas}. Pass what `shardwise compare`, LoadReport.save or MemoryProfile.save of this version wrote."
    )


def _on(counted: str) -> str:
    return f" on {counted}" if counted else ""


def _run_of_report(report: LoadReport) -> Run:
    nodes: dict[str, tuple[int, ...]] = {}
    for rank in report.ranks:
        nodes[rank.node] = (*nodes.get(rank.node, ()), rank.rank)
    anon = {rank.rank: rank.host_anon_peak_bytes for rank in report.ranks}
    return Run(
        mode=report.strategy,
        error=None,
        phase_seconds=report.phases,
        step_seconds=None,
        repeat_seconds=(),
        world_size=report.world_size,
        worst_rank=HostPeaks(anon_bytes=max(anon.values(), default=None), file_bytes=None, pss_bytes=None),
        others_anon_bytes=max((peak for rank, peak in anon.items() if rank != 0), default=None),
        node=HostPeaks(anon_bytes=None, file_bytes=None, pss_bytes=None),
        device_peak_bytes=max((rank.device_peak_bytes for rank in report.ranks), default=0),
        shard_bytes=max((rank.shard_bytes for rank in report.ranks), default=0),
        timelines=(),
        step_timelines=(),
        nodes=nodes,
        report=report,
    )


def _run_of_profiles(documents: Sequence[Mapping[str, Any]]) -> Run:
    lines = sorted((Timeline.from_json(document) for document in documents), key=lambda line: line.rank)
    ranks = [line.rank for line in lines]
    if len(set(ranks)) < len(ranks):
        raise ConfigurationError(
            f"memory profiles: expected each rank once, got ranks {ranks}. Pass one file of each rank."
        )
    nodes: dict[str, tuple[int, ...]] = {}
    for document in documents:
        where = str(document.get("node", ""))
        nodes[where] = (*nodes.get(where, ()), document["rank"])
    members = [[line for line in lines if line.rank in of_node] for of_node in nodes.values()]

    def worst(figure: Figure, *, but: int | None = None) -> int | None:
        peaks = [line.peak_bytes(figure, until_seconds=math.inf) for line in lines if line.rank != but]
        return max((peak for peak in peaks if peak is not None), default=None)

    def together(figure: Figure) -> int | None:
        peaks = [node_peak_bytes(of_node, figure, until=()) for of_node in members]
        return max((peak for peak in peaks if peak is not None), default=None)

    seconds: dict[str, float] = {}
    for line in lines:
        for name, length in line.phase_seconds().items():
            seconds[name] = max(seconds.get(name, 0.0), length)
    return Run(
        mode=PROFILES_MODE,
        error=None,
        phase_seconds=seconds,
        step_seconds=None,
        repeat_seconds=(),
        world_size=len(lines),
        worst_rank=HostPeaks(
            anon_bytes=worst("anon_bytes"), file_bytes=worst("file_bytes"), pss_bytes=worst("pss_bytes")
        ),
        others_anon_bytes=worst("anon_bytes", but=0),
        node=HostPeaks(
            anon_bytes=together("anon_bytes"),
            file_bytes=together("file_bytes"),
            pss_bytes=together("pss_bytes"),
        ),
        device_peak_bytes=worst("device_bytes") or 0,
        shard_bytes=0,
        timelines=tuple(lines),
        step_timelines=(),
        nodes=nodes,
        report=None,
    )
