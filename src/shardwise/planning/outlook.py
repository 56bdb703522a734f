"""A model laid out over a job that is not running: what each rank would keep, and where each byte comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from shardwise.materialization import (
    CpuStorage,
    Entry,
    SourceCost,
    Wanted,
    cost_of_source,
    entries_of,
    kept_dtypes,
    resting_collector,
    wanted_of,
)
from shardwise.plan import Layout, Sight
from shardwise.planning.load_plan import LoadPlan
from shardwise.planning.mesh_shape import TENSOR_AXIS, shard_ranks_of
from shardwise.planning.parameters import PlannedUnit, planned_units
from shardwise.planning.subject import Subject
from shardwise.planning.tensor_parallel import tensor_placements
from shardwise.planning.training_state import pinned_bytes_of
from shardwise.strategies.fsdp_config import FSDPConfig
from shardwise.strategies.placement import thrifty_dim
from shardwise.strategies.wrapping import ignored_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A job.

    Args:
        axes: Ranks by axis, as `axes_of` returned them.
        device: `"cpu"` or `"accelerator"`.
        offload: Whether shards are kept in host memory, where ranks are not.
        ranks_per_node: How many ranks share a node.
        staging_bytes: Bound of a rank's staging buffers.
        cpu_storage: Whether shards on CPU ranks may be pages of the files.
    """

    axes: Mapping[str, int]
    device: str
    offload: bool
    ranks_per_node: int
    staging_bytes: int
    cpu_storage: CpuStorage

    @property
    def on_host(self) -> bool:
        """Whether ranks are CPU ranks."""
        return self.device == "cpu"

    @property
    def shards_in_host_memory(self) -> bool:
        """Whether shards are."""
        return self.on_host or self.offload

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        ranks = 1
        for size in self.axes.values():
            ranks *= size
        return ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A subject in a setting.

    Args:
        subject: What is brought up.
        setting: Where.
        wanted: What comes from the source.
        sight: Of the source: every rank reads it.
        units: What FSDP2 gathers at a time, in the order in which a strategy shards it.
        buffer_bytes: Of buffers that the checkpoint holds.
    """

    subject: Subject
    setting: Setting
    wanted: Wanted
    sight: Sight
    units: tuple[PlannedUnit, ...]
    buffer_bytes: int

    @property
    def stored_bytes(self) -> int:
        """Of the stored tensors that the model takes."""
        stored = {s.name: s for bound in self.subject.binding.bound.values() for s in bound.stored}
        return sum(each.nbytes for each in stored.values())


def outlook_of(subject: Subject, setting: Setting) -> Outlook:
    """Lay a model out over a job.

    Args:
        subject: What is brought up.
        setting: Where.

    Raises:
        ConfigurationError: An axis `tp` without a plan for it.
        UnsupportedParameterError: FSDP2 cannot shard a parameter.
    """
    model, binding = subject.model, subject.binding
    with resting_collector():
        entries = entries_of(model)
        ignored = frozenset(id(parameter) for parameter in ignored_parameters(entries, FSDPConfig()))
        layouts = _layouts(model, entries, setting.axes, ignored)
        dtype_of = kept_dtypes(entries, binding.bound, None)
        (wanted,) = wanted_of(
            model,
            entries,
            binding.bound,
            partial=frozenset(),
            layouts=layouts,
            device=torch.device("cpu"),  # what is mapped, and only of CPU ranks
            cpu_storage=setting.cpu_storage if setting.on_host else "copy",
            dtype_of=dtype_of,
        )
        units = planned_units(model, entries, layouts, dtype_of, binding, ignored=ignored)
    ranks = next(iter(layouts.values())).mesh_ranks
    buffers = [entry for entry in entries if entry.role == "buffer" and entry.fqn in binding.bound]
    return Outlook(
        subject=subject,
        setting=setting,
        wanted=wanted,
        sight=Sight(
            ranks=ranks,
            nodes=tuple(f"node {rank // setting.ranks_per_node}" for rank in ranks),
            readers=ranks,
        ),
        units=units,
        buffer_bytes=sum(entry.tensor.numel() * dtype_of[entry.fqn].itemsize for entry in buffers),
    )


def load_plan_of(outlook: Outlook, *, route: str) -> LoadPlan:
    """Return what a load costs on one route.

    Args:
        outlook: Of the job.
        route: As `materialize` takes it.

    Raises:
        ConfigurationError: The route is not possible.
    """
    subject, setting = outlook.subject, outlook.setting
    with resting_collector():
        costs = cost_of_source(
            outlook.wanted,
            outlook.sight,
            route=route,
            staging_bytes=setting.staging_bytes,
            on_host=setting.shards_in_host_memory,
        )
    return _plan(outlook, subject, setting, costs)


def _plan(outlook: Outlook, subject: Subject, setting: Setting, costs: SourceCost) -> LoadPlan:
    cost = costs.cost
    parameters = [parameter for unit in outlook.units for parameter in unit.parameters]
    shard_bytes = sum(parameter.shard_bytes for parameter in parameters)
    reads = int(cost.reads.sum())
    host = cost.staging_bytes.copy()
    if setting.on_host:
        host += shard_bytes + outlook.buffer_bytes - cost.mapped_bytes
    elif setting.offload:
        host += sum(
            pinned_bytes_of(parameter.shard_bytes) if parameter.sharded else 0 for parameter in parameters
        )
    device = 0
    if not setting.on_host:
        here = outlook.buffer_bytes
        here += sum(p.shard_bytes for p in parameters if not (setting.offload and p.sharded))
        device = here + int(cost.device_staging_bytes.max())
    node_of = {name: number for number, name in enumerate(outlook.sight.ranks_of_node)}
    nodes = np.array([node_of[name] for name in outlook.sight.nodes])

    def of_node(counts: NDArray[np.int64]) -> int:
        return int(np.bincount(nodes, weights=counts).max())

    stored = {each.name for bound in subject.binding.bound.values() for each in bound.stored}
    return LoadPlan(
        model=subject.name,
        mesh=setting.axes,
        device=setting.device,
        estimated=subject.estimated,
        route=costs.route.name,
        route_reason=costs.route.reason,
        planned_ranks=costs.planned_ranks,
        tensors=len(stored),
        stored_bytes=outlook.stored_bytes,
        initialised=len(subject.binding.absent),
        storage_bytes=int(cost.storage_bytes.sum()),
        network_bytes=int(cost.network_bytes.sum()),
        reads=reads,
        mean_read_bytes=int(cost.read_bytes.sum()) // reads if reads else 0,
        rank_storage_bytes=int(cost.storage_bytes.max()),
        rank_network_bytes=int(cost.network_bytes.max()),
        rank_reads=int(cost.reads.max()),
        rank_files=int(cost.opened.sum(axis=1).max(initial=0)),
        node_storage_bytes=of_node(cost.storage_bytes),
        node_network_bytes=of_node(cost.network_bytes),
        rank_sent_bytes=int(cost.sent_bytes.max()),
        shard_bytes=shard_bytes,
        host_peak_bytes=int(host.max()),
        node_host_peak_bytes=of_node(host),
        device_peak_bytes=device,
    )


def _layouts(
    model: nn.Module, entries: Sequence[Entry], axes: Mapping[str, int], ignored: frozenset[int]
) -> dict[str, Layout]:
    sizes, shard_ranks = tuple(axes.values()), shard_ranks_of(axes)
    ranks = int(np.prod(sizes))
    members = tuple(range(ranks))
    tensor_ranks = axes.get(TENSOR_AXIS)
    cut = tensor_placements(model, entries) if tensor_ranks is not None else {}
    copies = (Replicate(),) * (len(sizes) - 1 - (tensor_ranks is not None))
    whole = Layout.replicated(members)
    known: dict[tuple[Placement, ...], Layout] = {}  # a model has few layouts and many parameters
    layouts = {}
    for entry in entries:
        if entry.role != "parameter" or id(entry.tensor) in ignored:
            layouts[entry.fqn] = whole
            continue
        placements: tuple[Placement, ...]
        if tensor_ranks is None:
            placements = (*copies, Shard(thrifty_dim(tuple(entry.tensor.shape), shard_ranks)))
        else:
            of_tensor = cut.get(entry.fqn, Replicate())
            on_rows = isinstance(of_tensor, (Shard, _StridedShard)) and of_tensor.dim == 0
            rows = _StridedShard(0, split_factor=tensor_ranks) if on_rows and tensor_ranks > 1 else Shard(0)
            placements = (*copies, rows, of_tensor)
        if placements not in known:
            known[placements] = Layout(mesh_shape=sizes, mesh_ranks=members, placements=placements)
        layouts[entry.fqn] = known[placements]
    return layouts
