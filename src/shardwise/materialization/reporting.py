"""What a call did cost, gathered from all ranks into one report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import nn

from shardwise.materialization.agreement import Agreement
from shardwise.materialization.structure import Entry
from shardwise.profiling import LoadReport, MemoryProfile, RankReport, own_node
from shardwise.tensors import dtype_name


def collect_report(
    model: nn.Module,
    agreement: Agreement,
    profile: MemoryProfile,
    *,
    name: str,
    strategy: str,
    route: str,
    route_reason: str,
    shard_bytes: int,
    storage_bytes: int,
    network_bytes: int,
    retried_reads: int,
    predicted: Mapping[str, int],
    origins: Mapping[str, str],
    converted: Sequence[str],
    dtypes: Mapping[str, str | None],
) -> LoadReport:
    """Gather every rank's cost.

    Args:
        model: As it is at the end.
        agreement: Of the call; a phase of it is open.
        profile: Of this rank; ended.
        name: Of the model or checkpoint.
        strategy: What sharded the model.
        route: How the values came.
        route_reason: Why they came that way.
        shard_bytes: That this rank keeps.
        storage_bytes: That this rank requested.
        network_bytes: That this rank received.
        retried_reads: Of this rank.
        predicted: What the plan said for the job.
        origins: Origin by name of tensor; a tied tensor's further names included.
        converted: Names of tensors that a conversion of whole tensors made.
        dtypes: Stored, compute, reduce and optimizer dtypes.

    Returns:
        The report, with the phases of this rank.
    """
    own = RankReport(
        rank=agreement.rank,
        node=own_node(),
        host_anon_peak_bytes=profile.anon_peak_bytes,
        device_peak_bytes=profile.device_peak_bytes,
        shard_bytes=shard_bytes,
        storage_bytes=storage_bytes,
        network_bytes=network_bytes,
        retried_reads=retried_reads,
        seconds=profile.seconds,
    )
    gathered = agreement.gather("report", json.dumps(asdict(own)))
    reports = tuple(RankReport.from_json(json.loads(text)) for text in gathered)
    phases: dict[str, float] = {}
    for span in profile.phases:
        if span.depth == 0:
            phases[span.name] = phases.get(span.name, 0.0) + span.stop_seconds - span.start_seconds
    counts: dict[str, int] = {}
    for origin in origins.values():
        counts[origin] = counts.get(origin, 0) + 1
    return LoadReport(
        model=name,
        strategy=strategy,
        route=route,
        route_reason=route_reason,
        world_size=dist.get_world_size() if dist.is_initialized() else 1,
        seconds=max(report.seconds for report in reports),
        phases=phases,
        storage_bytes=sum(report.storage_bytes for report in reports),
        network_bytes=sum(report.network_bytes for report in reports),
        predicted=dict(predicted),
        tensors=counts,
        origins=dict(origins),
        converted=tuple(converted),
        dtypes=dict(dtypes),
        ranks=reports,
    )


def origins_of(entries: tuple[Entry, ...], known: Mapping[str, str]) -> dict[str, str]:
    """Return where every parameter and buffer has its values from.

    Args:
        entries: Of the model.
        known: Origins as they were noted where values were set, by the first of a tensor's names. What nobody set is kept.

    Returns:
        Origin by name.
    """
    origins: dict[str, str] = {}
    for entry in entries:
        if entry.role != "attribute":
            origins[entry.fqn] = known.get(entry.fqn, "kept")
            origins |= dict.fromkeys((slot.fqn for slot in entry.slots[1:]), "tied")
    return origins


def stored_dtypes(parameters: Iterable[torch.Tensor]) -> str:
    """Return the names of the dtypes in which parameters are kept."""
    return " + ".join(sorted({dtype_name(parameter.dtype) for parameter in parameters})) or "none"
