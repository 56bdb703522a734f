"""What a source costs all ranks of a job that is not running: the counterpart of what each rank plans for itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shardwise.materialization.convert import ConvertedTensor, plan_conversions, source_bytes_of
from shardwise.materialization.device_placing import LANES
from shardwise.materialization.source_plan import EXCHANGE_BUFFERS
from shardwise.materialization.staging import read_bytes_of, ring_shape
from shardwise.materialization.wanted import Wanted
from shardwise.plan import (
    JobCost,
    Route,
    Sharing,
    Sight,
    Staging,
    add_cost,
    choose_route,
    cost_of_job,
    divide,
    rank_classes,
)

_MOST_PIECES = 500_000
"""Up to so many pieces of tensors, times ranks, every rank is planned: some seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCost:
    """What a source costs.

    Args:
        route: That it takes.
        cost: On each rank.
        planned_ranks: How many were planned one by one; the others have shards of the same shapes as one of these.
    """

    route: Route
    cost: JobCost
    planned_ranks: int


def cost_of_source(
    wanted: Wanted, sight: Sight, *, route: str, staging_bytes: int, on_host: bool
) -> SourceCost:
    """Return what a source costs each rank.

    Args:
        wanted: What of a model comes from it.
        sight: Of the source.
        route: That is asked for.
        staging_bytes: Bound of the staging buffers.
        on_host: Whether shards are in host memory.

    Raises:
        ConfigurationError: The route is not possible.
    """
    shape = ring_shape(staging_bytes, on_host=on_host)
    chosen = choose_route(route, wanted.pieces, sight, max_read_bytes=read_bytes_of(staging_bytes))
    division = divide(chosen, wanted.pieces, sight)
    classes = rank_classes(wanted.pieces, sight, most_pieces=_MOST_PIECES)
    staging = Staging(
        ring_buffers=shape.count,
        read_bytes=shape.nbytes,
        scratch_bytes=0 if on_host else LANES * shape.nbytes,
        exchange_bytes=staging_bytes // EXCHANGE_BUFFERS,
        in_place=on_host,
    )
    names = sorted({stored.file for stored in wanted.source.tensors.values()})
    files = {name: number for number, name in enumerate(names)}
    cost = cost_of_job(wanted.pieces, division, sight, classes, staging=staging, files=files)
    if wanted.converted:
        position_of = {rank: position for position, rank in enumerate(sight.ranks)}
        for converters in division.converters:
            more = _cost_of_conversions(wanted, converters, classes, staging=staging, files=files)
            add_cost(cost, more, np.array([position_of[rank] for rank in converters.ranks]))
    return SourceCost(route=chosen, cost=cost, planned_ranks=len(classes))


def _cost_of_conversions(
    wanted: Wanted,
    converters: Sharing,
    classes: Sequence[Sequence[int]],
    *,
    staging: Staging,
    files: Mapping[str, int],
) -> JobCost:
    cost = JobCost.of_nothing(len(converters.ranks), files=len(files))
    position_of = {rank: position for position, rank in enumerate(converters.ranks)}
    for members in classes:
        here = [rank for rank in members if rank in position_of]
        if not here:
            continue
        steps = plan_conversions(
            wanted.converted,
            ranks=converters.ranks,
            readers=converters.readers,
            rank=here[0],
            buffer_bytes=staging.exchange_bytes,
        )
        received = sum(step.exchange.network_bytes for step in steps)
        cost.network_bytes[[position_of[rank] for rank in here]] = received
    groups: dict[int, list[ConvertedTensor]] = {}
    for tensor in wanted.converted:
        groups.setdefault(id(tensor.whole), []).append(tensor)
    whole_bytes = np.zeros(len(converters.ranks), dtype=np.int64)
    for number, group in enumerate(groups.values()):
        at = position_of[converters.readers[number % len(converters.readers)]]
        source_bytes = source_bytes_of(group[0].whole, wanted.source)
        cost.storage_bytes[at] += source_bytes
        cost.read_bytes[at] += source_bytes
        source_names = group[0].whole.group.source_names
        cost.reads[at] += len(source_names)
        for name in source_names:
            cost.opened[at, files[wanted.source.tensors[name].file]] = True
        whole_bytes[at] += source_bytes
        made_bytes = sum(
            torch.Size(tensor.whole.shapes[tensor.name]).numel() * tensor.dtype.itemsize for tensor in group
        )
        cost.staging_bytes[at] = max(cost.staging_bytes[at], source_bytes + made_bytes)
    if whole_bytes.any():
        share = whole_bytes / whole_bytes.sum()
        cost.sent_bytes[:] = (share * cost.network_bytes.sum()).astype(np.int64)
    return cost
