"""The figures of a comparison document, as the table and the picture both need them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shardwise.errors import ConfigurationError
from shardwise.profiling import Figure, LoadReport, Timeline, node_peak_bytes
from shardwise.report.joined import load_and_step

SCHEMA: Final = "shardwise.compare/1"
LOAD_PHASES: Final = ("from_pretrained", "optimizer", "wrap_model")
STEP_PHASE: Final = "step"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPeaks:
    """Highest increases of host memory while loading, in bytes; None where not measured."""

    anon_bytes: int | None
    file_bytes: int | None
    pss_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One mode of a comparison.

    Args:
        mode: The mode's name.
        error: What went wrong; None where nothing did, and then the other figures are there.
        phase_seconds: Seconds by phase.
        step_seconds: Seconds of the training step.
        world_size: Number of ranks.
        worst_rank: Highest of any rank, each figure on its own.
        node: Highest sum over the ranks of the fullest node.
        device_peak_bytes: Highest of any rank; 0 where there is no device.
        shard_bytes: Largest shard of any rank.
        timelines: Memory over time, by rank; the training step follows the load after a short break.
        break_seconds: Middle of that break, since the start of the earliest timeline; None where there is none.
        nodes: Ranks by host name.
    """

    mode: str
    error: str | None
    phase_seconds: Mapping[str, float]
    step_seconds: float | None
    world_size: int
    worst_rank: HostPeaks
    node: HostPeaks
    device_peak_bytes: int
    shard_bytes: int
    timelines: tuple[Timeline, ...]
    break_seconds: float | None
    nodes: Mapping[str, tuple[int, ...]]

    @property
    def node_timelines(self) -> tuple[Timeline, ...]:
        """The timelines of the node with the highest anonymous peak."""
        members = [
            tuple(line for line in self.timelines if line.rank in ranks) for ranks in self.nodes.values()
        ] or [self.timelines]
        return max(members, key=lambda lines: node_peak_bytes(lines, "anon_bytes", until=LOAD_PHASES) or 0)


def model_name(comparison: Mapping[str, Any]) -> str:
    """Return the model's name for people: a hub id as it is, of a directory its last part."""
    model = str(comparison.get("model") or "the model")
    return Path(model).name if Path(model).is_absolute() else model


def read_comparison(comparison: Mapping[str, Any]) -> tuple[Run, ...]:
    """Read the runs of a comparison document.

    Args:
        comparison: A document of schema `shardwise.compare/1`.

    Returns:
        The runs in the document's order.

    Raises:
        ConfigurationError: The schema is another one, a key is missing, or there is no run.
    """
    if comparison.get("schema") != SCHEMA:
        raise ConfigurationError(
            f"comparison: expected schema {SCHEMA!r}, got {comparison.get('schema')!r}. "
            "Pass what `shardwise compare --json FILE` wrote."
        )
    try:
        runs = tuple(_read_run(run) for run in comparison["runs"])
    except KeyError as error:
        raise ConfigurationError(
            f"comparison: expected the key {error.args[0]!r}, and it is missing. "
            "Pass what `shardwise compare --json FILE` of this version of shardwise wrote."
        ) from error
    if not runs:
        raise ConfigurationError("comparison: expected at least one run, got none")
    return runs


def _read_run(run: Mapping[str, Any]) -> Run:
    if run["status"] != "ok":
        nothing = HostPeaks(anon_bytes=None, file_bytes=None, pss_bytes=None)
        return Run(
            mode=run["mode"],
            error=str(run.get("error") or "failed without a message"),
            phase_seconds={},
            step_seconds=None,
            world_size=0,
            worst_rank=nothing,
            node=nothing,
            device_peak_bytes=0,
            shard_bytes=0,
            timelines=(),
            break_seconds=None,
            nodes={},
        )
    report = LoadReport.from_json({field.name: run[field.name] for field in dataclasses.fields(LoadReport)})
    timelines, break_seconds = load_and_step(run["timelines"], run.get("step_timelines", ()))
    nodes: dict[str, tuple[int, ...]] = {}
    for rank in report.ranks:
        nodes[rank.node] = (*nodes.get(rank.node, ()), rank.rank)
    return Run(
        mode=run["mode"],
        error=None,
        phase_seconds=report.phases,
        step_seconds=run["step_seconds"],
        world_size=report.world_size,
        worst_rank=HostPeaks(
            anon_bytes=max((rank.host_anon_peak_bytes for rank in report.ranks), default=None),
            file_bytes=_worst(timelines, "file_bytes", break_seconds),
            pss_bytes=_worst(timelines, "pss_bytes", break_seconds),
        ),
        node=HostPeaks(
            anon_bytes=run["node"]["host_anon_peak_bytes"],
            file_bytes=run["node"]["host_file_peak_bytes"],
            pss_bytes=run["node"]["host_pss_peak_bytes"],
        ),
        device_peak_bytes=max((rank.device_peak_bytes for rank in report.ranks), default=0),
        shard_bytes=max((rank.shard_bytes for rank in report.ranks), default=0),
        timelines=timelines,
        break_seconds=break_seconds,
        nodes=nodes,
    )


def load_end_seconds(line: Timeline, *, timelines: Sequence[Timeline], break_seconds: float | None) -> float:
    """Return when the load of one rank ends, since its profile's start.

    Args:
        line: The rank's timeline.
        timelines: Those of all ranks.
        break_seconds: The break before the step, since the start of the earliest timeline; None where there is none,
            and then the last phase of the load is the end.
    """
    if break_seconds is not None:
        return break_seconds - (
            line.started_at_seconds - min(other.started_at_seconds for other in timelines)
        )
    end = line.phases_end_seconds(LOAD_PHASES)
    return math.inf if end is None else end


def _worst(timelines: Sequence[Timeline], figure: Figure, break_seconds: float | None) -> int | None:
    peaks = (
        line.peak_bytes(
            figure, until_seconds=load_end_seconds(line, timelines=timelines, break_seconds=break_seconds)
        )
        for line in timelines
    )
    return max((peak for peak in peaks if peak is not None), default=None)
