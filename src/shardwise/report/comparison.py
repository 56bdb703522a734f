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
from shardwise.report.timelines import LOAD_PHASES, load_timelines, step_timelines

SCHEMA: Final = "shardwise.compare/1"


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
        repeat_seconds: Seconds of the load in each of several runs, of which this is the median one; empty for a single one.
        world_size: Number of ranks.
        worst_rank: Highest of any rank, each figure on its own.
        others_anon_bytes: Highest anonymous memory of any rank but rank 0; None where there is no other.
        node: Highest sum over the ranks of the fullest node.
        device_peak_bytes: Highest of any rank; 0 where there is no device.
        shard_bytes: Largest shard of any rank.
        timelines: Memory over time while loading, by rank.
        step_timelines: Memory over time during the training step, by rank, above the same start; none where the
            step was not sampled apart.
        nodes: Ranks by host name.
        report: What the strategy reported; None where the mode failed, or nothing was loaded.
    """

    mode: str
    error: str | None
    phase_seconds: Mapping[str, float]
    step_seconds: float | None
    repeat_seconds: tuple[float, ...]
    world_size: int
    worst_rank: HostPeaks
    others_anon_bytes: int | None
    node: HostPeaks
    device_peak_bytes: int
    shard_bytes: int
    timelines: tuple[Timeline, ...]
    step_timelines: tuple[Timeline, ...]
    nodes: Mapping[str, tuple[int, ...]]
    report: LoadReport | None

    @property
    def node_timelines(self) -> tuple[Timeline, ...]:
        """The load's timelines of the node with the highest anonymous peak."""
        members = [
            tuple(line for line in self.timelines if line.rank in ranks) for ranks in self.nodes.values()
        ] or [self.timelines]
        return max(members, key=lambda lines: node_peak_bytes(lines, "anon_bytes", until=LOAD_PHASES) or 0)

    @property
    def node_step_timelines(self) -> tuple[Timeline, ...]:
        """The step's timelines of the same node."""
        ranks = {line.rank for line in self.node_timelines}
        return tuple(line for line in self.step_timelines if line.rank in ranks)


def model_name(comparison: Mapping[str, Any]) -> str:
    """Return the model's name for people: a hub id as it is, of a directory its last part."""
    model = str(comparison.get("model") or "the model")
    return Path(model).name if Path(model).is_absolute() else model


def counted_ranks(comparison: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """Return how many ranks the runs had, for people; nothing where none came to its end."""
    replicas = comparison.get("replicas", 1)
    counted = ranks_in_words(max(run.world_size for run in runs))
    return f"{counted} ({replicas} replicas)" if counted and replicas > 1 else counted


def ranks_in_words(ranks: int) -> str:
    """Return a number of ranks for people; nothing for none."""
    return f"{ranks} rank{'' if ranks == 1 else 's'}" if ranks else ""


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
            repeat_seconds=(),
            world_size=0,
            worst_rank=nothing,
            others_anon_bytes=None,
            node=nothing,
            device_peak_bytes=0,
            shard_bytes=0,
            timelines=(),
            step_timelines=(),
            nodes={},
            report=None,
        )
    report = LoadReport.from_json({field.name: run[field.name] for field in dataclasses.fields(LoadReport)})
    timelines = load_timelines(run["timelines"])
    nodes: dict[str, tuple[int, ...]] = {}
    for rank in report.ranks:
        nodes[rank.node] = (*nodes.get(rank.node, ()), rank.rank)
    return Run(
        mode=run["mode"],
        error=None,
        phase_seconds=report.phases,
        step_seconds=run["step_seconds"],
        repeat_seconds=tuple(run.get("repeat_seconds", ())),
        world_size=report.world_size,
        worst_rank=HostPeaks(
            anon_bytes=max((rank.host_anon_peak_bytes for rank in report.ranks), default=None),
            file_bytes=_worst(timelines, "file_bytes"),
            pss_bytes=_worst(timelines, "pss_bytes"),
        ),
        others_anon_bytes=max(
            (rank.host_anon_peak_bytes for rank in report.ranks if rank.rank != 0), default=None
        ),
        node=HostPeaks(
            anon_bytes=run["node"]["host_anon_peak_bytes"],
            file_bytes=run["node"]["host_file_peak_bytes"],
            pss_bytes=run["node"]["host_pss_peak_bytes"],
        ),
        device_peak_bytes=max((rank.device_peak_bytes for rank in report.ranks), default=0),
        shard_bytes=max((rank.shard_bytes for rank in report.ranks), default=0),
        timelines=timelines,
        step_timelines=step_timelines(run.get("step_timelines", ()), loads=run["timelines"]),
        nodes=nodes,
        report=report,
    )


def _worst(timelines: Sequence[Timeline], figure: Figure) -> int | None:
    peaks = (line.peak_bytes(figure, until_seconds=math.inf) for line in timelines)
    return max((peak for peak in peaks if peak is not None), default=None)
