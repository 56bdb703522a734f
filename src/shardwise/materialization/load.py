"""Carry out what was planned: allocate, map, read, exchange, convert."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from shardwise.checkpoint import Run, fetch_mapped
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.awaited_source import awaited, mapped, require_unchanged, stitched
from shardwise.materialization.convert import convert
from shardwise.materialization.data_plane import DataPlane, open_data_plane
from shardwise.materialization.device_placing import LANES, DevicePlacing, device_of_targets
from shardwise.materialization.exchange import Exchange
from shardwise.materialization.layouts import layout_of as layout_of
from shardwise.materialization.left_behind import refuse_left_behind
from shardwise.materialization.out_of_memory import naming_out_of_memory
from shardwise.materialization.read import Reading, Shards
from shardwise.materialization.replicas import require_equal_replicas
from shardwise.materialization.source_plan import SourcePlan
from shardwise.materialization.staging import StagingRing, ring_shape
from shardwise.materialization.storage import allocate_parameters, around_local, local_of
from shardwise.materialization.structure import Entry, renewed
from shardwise.plan import ReadPlan, buffers_wanted, plan_reads
from shardwise.profiling import phase

_MOST_STITCHED_RUNS = 16_384
"""Of a load on one rank, each one or two of the 65,530 mappings that Linux allows a process; what is beyond is copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a load did on this rank.

    Args:
        storage_bytes: Requested from storage, mapped ones included.
        network_bytes: Received from other ranks.
        retried_reads: Reads that were tried again after an error that was over in a moment.
    """

    storage_bytes: int
    network_bytes: int
    retried_reads: int


def allocate(
    model: nn.Module,
    entries: Sequence[Entry],
    plans: Sequence[SourcePlan],
    *,
    device: torch.device,
    on_host: bool,
    staging_bytes: int,
    dtype_of: Mapping[str, torch.dtype],
    agreement: Agreement,
) -> tuple[list[SourcePlan], dict[str, torch.Tensor]]:
    """Give every meta parameter storage: pages of the file where the plan says so, else memory.

    Args:
        model: As planned.
        entries: Of the model.
        plans: Of this rank.
        device: Of parameters outside of FSDP2.
        on_host: Whether shards lie in host memory.
        staging_bytes: Bound of the staging buffers.
        dtype_of: In which each shard is kept, by fqn; also of parameters that no plan has.
        agreement: Of the call.

    Returns:
        The plans, in which what could not be mapped after all is read, and this rank's shards by fqn.

    Raises:
        CheckpointError: A file cannot be opened, or has changed.
        OutOfMemoryError: There is no memory for the shards.
        PeerError: Another rank failed.
        StalledReadError: A file system does not answer, or has not answered yet what an earlier load has asked.
    """
    pages: dict[str, torch.Tensor] = {}
    final: list[SourcePlan] = []
    beyond = _beyond_mappings(plans)
    max_read_bytes = ring_shape(staging_bytes, on_host=on_host).nbytes
    for plan in plans:
        unmapped: set[str] = set()
        for item, found in zip(plan.direct.mapped, _map(plan, beyond, dtype_of, agreement), strict=True):
            if found is None:
                unmapped.add(item.fqn)
            else:
                pages[item.fqn] = found
        final.append(_read_instead(plan, unmapped, max_read_bytes) if unmapped else plan)
        fetch_mapped(
            plan.source,
            [(run.file, run.start, run.stop) for item in final[-1].direct.mapped for run in item.runs],
        )
    planned = {fqn for plan in plans for fqn in plan.fqns}
    with naming_out_of_memory("the shards", device=device, rank=agreement.rank):
        allocate_parameters(model, entries, device, pages=pages, dtype_of=dtype_of)
        allocate_buffers(entries, planned, device)
    targets = {
        entry.fqn: local_of(entry.tensor)
        for entry in renewed(entries)
        if entry.role != "attribute" and entry.fqn in planned
    }
    refuse_left_behind(targets)
    return final, targets


def _beyond_mappings(plans: Sequence[SourcePlan]) -> set[str]:
    """Return the shards of several runs for which a process may have too few mappings."""
    beyond: set[str] = set()
    left = _MOST_STITCHED_RUNS
    for item in (item for plan in plans for item in plan.direct.mapped if len(item.runs) > 1):
        if len(item.runs) > left:
            beyond.add(item.fqn)
        else:
            left -= len(item.runs)
    return beyond


def _map(
    plan: SourcePlan, beyond: Collection[str], dtypes: Mapping[str, torch.dtype], agreement: Agreement
) -> list[torch.Tensor | None]:
    whole: dict[str, list[tuple[str, Run]]] = {}
    several: dict[str, list[Run]] = {}
    for item in plan.direct.mapped:
        dtype = dtypes[item.fqn]
        runs = [
            Run(file=of.file, start=of.start, dtype=dtype, numel=(of.stop - of.start) // dtype.itemsize)
            for of in item.runs
        ]
        if len(runs) == 1:
            whole.setdefault(runs[0].file, []).append((item.fqn, runs[0]))
        elif item.fqn not in beyond:
            several[item.fqn] = runs
    found: dict[str, torch.Tensor | None] = {}
    for of_file in whole.values():  # each file at once: pages of two calls are never the same
        pages = mapped(plan.source, [run for _, run in of_file], agreement)
        found |= zip((fqn for fqn, _ in of_file), pages, strict=True)
    if several:
        found |= zip(several, stitched(plan.source, list(several.values()), agreement), strict=True)
    return [found.get(item.fqn) for item in plan.direct.mapped]


def _read_instead(plan: SourcePlan, unmapped: set[str], max_read_bytes: int) -> SourcePlan:
    # What this rank reads for others too it keeps of that.
    alone = unmapped.difference(*(each.mapped for each in plan.exchanges))
    wanted = [dataclasses.replace(t, may_map=False) for t in plan.wanted.pieces if t.fqn in alone]
    extra = plan_reads(wanted, rank=plan.direct.rank, max_read_bytes=max_read_bytes)
    direct = ReadPlan(
        rank=plan.direct.rank,
        mapped=tuple(item for item in plan.direct.mapped if item.fqn not in unmapped),
        reads=(*plan.direct.reads, *extra.reads),
        shared=plan.direct.shared - unmapped,
    )
    exchanges = tuple(dataclasses.replace(each, mapped=each.mapped - unmapped) for each in plan.exchanges)
    return dataclasses.replace(plan, direct=direct, exchanges=exchanges)


def allocate_buffers(entries: Sequence[Entry], bound: Collection[str], device: torch.device) -> None:
    """Give buffers on meta storage, their values undefined.

    Args:
        entries: Of a model, sharded or not.
        bound: Their fqns.
        device: Where they go.
    """
    for entry in entries:
        if entry.role == "buffer" and entry.fqn in bound and entry.tensor.is_meta:
            shape = local_of(entry.tensor).shape  # of a DTensor this rank's shard, as of a parameter
            local = torch.empty(shape, dtype=entry.tensor.dtype, device=device)
            entry.replace(around_local(entry.tensor, local))


def execute(
    plans: Sequence[SourcePlan],
    targets: Mapping[str, torch.Tensor],
    *,
    device: torch.device,
    on_host: bool,
    staging_bytes: int,
    agreement: Agreement,
    done: Callable[[int], None],
) -> Loaded:
    """Carry out what was planned.

    Args:
        plans: Of this rank.
        targets: This rank's shards by fqn.
        device: Of the mesh, on this rank.
        on_host: Whether shards lie in host memory, as it was planned.
        staging_bytes: Bound of the staging buffers.
        agreement: Of the call.
        done: Told the bytes of each completed read.

    Returns:
        What it did cost.

    Raises:
        CheckpointError: A file cannot be read, or has changed.
        PeerError: Another rank failed.
    """
    retried_before = sum(getattr(plan.source, "retries", 0) for plan in plans)
    with ExitStack() as stack:
        # Before anything is read: all ranks stand here together, and one that fails to read would never come to it later.
        planes: dict[tuple[int, ...], DataPlane] = {}
        for group in dict.fromkeys(group for plan in plans for group in plan.groups):
            planes[group] = stack.enter_context(open_data_plane(group, device=device, agreement=agreement))
        for plan in plans:
            done(plan.direct.mapped_bytes)
        with phase("read"):
            _read(
                plans, targets, on_host=on_host, staging_bytes=staging_bytes, agreement=agreement, done=done
            )
        for plan in plans:
            with awaited(plan.source, agreement, name=plan.source.name) as source:
                with phase("exchange"):
                    for each in plan.exchanges:
                        plane = planes.get(each.ranks)
                        Exchange(each, source=source, targets=targets, plane=plane, done=done).run()
                with phase("convert"):
                    plane = planes.get(plan.converters)
                    convert(plan.steps, source, place=targets, plane=plane, agreement=agreement, done=done)
            with phase("compare replicas"):
                for ranks, fqns in plan.replicated.items():
                    if ranks in planes:
                        require_equal_replicas(
                            fqns, targets, ranks=ranks, rank=agreement.rank, plane=planes[ranks]
                        )
    for plan in plans:
        require_unchanged(plan.source, agreement)
    return Loaded(
        storage_bytes=sum(plan.storage_bytes for plan in plans),
        network_bytes=sum(plan.network_bytes for plan in plans),
        retried_reads=sum(getattr(plan.source, "retries", 0) for plan in plans) - retried_before,
    )


def _read(
    plans: Sequence[SourcePlan],
    targets: Mapping[str, torch.Tensor],
    *,
    on_host: bool,
    staging_bytes: int,
    agreement: Agreement,
    done: Callable[[int], None],
) -> None:
    """Read what this rank reads for itself."""
    shape = ring_shape(staging_bytes, on_host=on_host)
    # Pinning takes its time. In host memory nothing is allocated before it is used.
    count = shape.count
    if not on_host:
        count = buffers_wanted([plan.direct for plan in plans], most=shape.count, nbytes=shape.nbytes)
    destination = device_of_targets(targets)
    with ExitStack() as stack:
        ring = StagingRing(count=count, nbytes=shape.nbytes, device=destination)
        stack.callback(ring.close)
        placing = None
        if destination.type != "cpu":
            placing = DevicePlacing(targets, device=destination, lanes=LANES, scratch_bytes=shape.nbytes)
            stack.callback(placing.close)  # before the memory that it copies from goes
        for plan in plans:
            shards = Shards(targets, placing=placing)
            Reading(
                plan.direct,
                source=plan.source,
                ring=ring,
                agreement=agreement,
                done=done,
                place=shards.place,
                in_place=shards.in_place,
            ).run()
