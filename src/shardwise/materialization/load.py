"""Bring bound tensors from a checkpoint into place: plan, allocate, map, read, exchange."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from shardwise.checkpoint import Source
from shardwise.errors import ConfigurationError
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.binding import Bound
from shardwise.materialization.convert import (
    ConversionStep,
    ConvertedTensor,
    convert,
    plan_conversions,
    source_bytes_of,
)
from shardwise.materialization.data_plane import open_data_plane
from shardwise.materialization.exchange import Exchange
from shardwise.materialization.read import Reading, Shards
from shardwise.materialization.staging import StagingRing
from shardwise.materialization.storage import allocate_parameters, local_of, mappable_parameters
from shardwise.materialization.structure import Entry, entries_of
from shardwise.plan import Layout, LoadPlan, Mapped, Round, WantedTensor, exchanged, plan_load, plan_rounds
from shardwise.profiling import phase

CpuStorage = Literal["auto", "map", "copy"]
CPU_STORAGE = ("auto", "map", "copy")

_LARGEST_READ_BYTES = 4 * 2**20
_BUFFERS = 8
EXCHANGE_BUFFERS = 4  # slice, messages out, messages in, and what rounding and alignment add


def check_cpu_storage(cpu_storage: str) -> None:
    """Raise unless a text says how shards of CPU ranks are kept.

    Raises:
        ConfigurationError: It does not.
    """
    if cpu_storage not in CPU_STORAGE:
        raise ConfigurationError(
            f"cpu_storage: expected one of {', '.join(CPU_STORAGE)}, got {cpu_storage!r}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a load did on this rank.

    Args:
        storage_bytes: Requested from storage, mapped ones included.
        network_bytes: Received from other ranks.
    """

    storage_bytes: int
    network_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """What this rank does with one source.

    Args:
        source: Open.
        wanted: Tensors of the model that consist of pieces of stored ones.
        converted: Those that a conversion makes of whole ones.
        direct: What it reads for itself.
        rounds: What it reads and exchanges.
        steps: What it converts and exchanges.
    """

    source: Source
    wanted: tuple[WantedTensor, ...]
    converted: tuple[ConvertedTensor, ...]
    direct: LoadPlan
    rounds: tuple[Round, ...]
    steps: tuple[ConversionStep, ...]

    @property
    def dtype_of(self) -> dict[str, torch.dtype]:
        """In which each tensor's shard is kept, by fqn."""
        kept = {tensor.fqn: tensor.dtype for tensor in self.wanted}
        return kept | {tensor.fqn: tensor.dtype for tensor in self.converted}

    @property
    def storage_bytes(self) -> int:
        """Bytes that this rank requests."""
        read = sum(turn.read.stop - turn.read.start for turn in self.rounds if turn.read is not None)
        whole = sum(source_bytes_of(step.whole, self.source) for step in self.steps if step.whole is not None)
        return self.direct.storage_bytes + read + whole

    @property
    def network_bytes(self) -> int:
        """Bytes of messages that this rank receives from others."""
        rounds = (*self.rounds, *(turn for step in self.steps for turn in step.rounds))
        return sum(sum(turn.receive_bytes) for turn in rounds)


def layout_of(tensor: torch.Tensor, ranks: Sequence[int]) -> Layout:
    """Return how a parameter lies over the ranks: a DTensor as its placements say, anything else whole on each."""
    if not isinstance(tensor, DTensor):
        return _replicated(tuple(ranks))
    return _layout_on(tensor.device_mesh, tuple(tensor.placements))


@lru_cache(maxsize=64)
def _replicated(ranks: tuple[int, ...]) -> Layout:
    return Layout.replicated(ranks)


@lru_cache(maxsize=64)  # a model has few layouts and many parameters
def _layout_on(mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Layout:
    return Layout(
        mesh_shape=tuple(mesh.shape),
        mesh_ranks=tuple(mesh.mesh.flatten().tolist()),
        placements=placements,
    )


def plan_sources(
    model: nn.Module,
    bound: Mapping[str, Bound],
    *,
    ranks: Sequence[int],
    rank: int,
    device: torch.device,
    staging_bytes: int,
    cpu_storage: CpuStorage,
    dtype_of: Callable[[Entry, Bound], torch.dtype],
    first_rank_reads: bool = False,
) -> list[SourcePlan]:
    """Plan what this rank reads from each source.

    Args:
        model: Sharded, on meta or with storage.
        bound: Where values are, by fqn.
        ranks: Global ranks of the call.
        rank: This one.
        device: Of parameters outside of FSDP2.
        staging_bytes: Bound of the staging buffers.
        cpu_storage: Whether shards in host memory may be pages of the file.
        dtype_of: In which a shard is kept.
        first_rank_reads: Whether the first rank alone can read the sources, as it is with a state dict.

    Returns:
        One plan per source, in the order in which the model names them.

    Raises:
        ConfigurationError: `cpu_storage="map"` where nothing can be mapped.
    """
    may_map = mappable_parameters(model, device) if cpu_storage != "copy" else frozenset()
    by_source: dict[int, tuple[Source, list[WantedTensor], list[ConvertedTensor]]] = {}
    taken: set[tuple[int, str]] = set()
    for entry in entries_of(model):
        if entry.role == "attribute" or entry.fqn not in bound:
            continue
        of = bound[entry.fqn]
        _, wanted, converted = by_source.setdefault(id(of.source), (of.source, [], []))
        if of.whole is not None:
            converted.append(
                ConvertedTensor(
                    fqn=entry.fqn,
                    name=of.name,
                    whole=of.whole,
                    dtype=dtype_of(entry, of),
                    layout=layout_of(entry.tensor, ranks),
                )
            )
            continue
        names = {(id(of.source), stored.name) for stored in of.stored}
        wanted.append(
            WantedTensor(
                fqn=entry.fqn,
                shape=of.shape,
                dtype=dtype_of(entry, of),
                layout=layout_of(entry.tensor, ranks),
                pieces=of.pieces,
                # Two parameters over the same pages would be one.
                may_map=entry.fqn in may_map and not names & taken,
            )
        )
        taken |= names
    plans = [
        _plan_source(
            source,
            tuple(wanted),
            tuple(converted),
            ranks=ranks,
            rank=rank,
            staging_bytes=staging_bytes,
            first_rank_reads=first_rank_reads and len(ranks) > 1,
        )
        for source, wanted, converted in by_source.values()
    ]
    mapped = (t.mapped_on(t.layout.mesh_ranks[0]) for plan in plans for t in plan.wanted)
    if cpu_storage == "map" and not any(mapped):
        raise ConfigurationError(
            f"cpu_storage='map': expected shards in host memory that are runs of bytes in the file, in its dtype, got "
            f"none (device {device}). Use cpu_storage='auto', which copies what cannot be mapped."
        )
    return plans


def _plan_source(
    source: Source,
    wanted: tuple[WantedTensor, ...],
    converted: tuple[ConvertedTensor, ...],
    *,
    ranks: Sequence[int],
    rank: int,
    staging_bytes: int,
    first_rank_reads: bool,
) -> SourcePlan:
    together = frozenset(range(len(wanted))) if first_rank_reads else exchanged(wanted, ranks=ranks)
    alone = [tensor for index, tensor in enumerate(wanted) if index not in together]
    rounds = plan_rounds(
        wanted,
        together,
        ranks=ranks,
        rank=rank,
        buffer_bytes=staging_bytes // EXCHANGE_BUFFERS,
        reader_of=(lambda _: 0) if first_rank_reads else None,
    )
    if converted and first_rank_reads:
        raise ConfigurationError(
            f"{source.name}: expected files that every rank can read, got a state dict of the first rank, which the conversion "
            f"{converted[0].whole.group.operations} of {converted[0].fqn} must see whole. Save it as safetensors, or "
            "convert it before."
        )
    steps = plan_conversions(
        converted, ranks=ranks, rank=rank, buffer_bytes=staging_bytes // EXCHANGE_BUFFERS
    )
    return SourcePlan(
        source=source,
        wanted=wanted,
        converted=converted,
        steps=steps,
        direct=plan_load(alone, rank=rank, max_read_bytes=read_bytes_of(staging_bytes)),
        rounds=tuple(rounds) if together else (),
    )


def read_bytes_of(staging_bytes: int) -> int:
    """Return the size of one read, and of one staging buffer."""
    return max(16, min(_LARGEST_READ_BYTES, staging_bytes // _BUFFERS))


def staging_ring(staging_bytes: int, device: torch.device) -> StagingRing:
    """Return the staging buffers of a call, within its bound."""
    return StagingRing(count=_BUFFERS, nbytes=read_bytes_of(staging_bytes), device=device)


def allocate(
    model: nn.Module, plans: Sequence[SourcePlan], *, device: torch.device, staging_bytes: int
) -> tuple[list[SourcePlan], dict[str, torch.Tensor]]:
    """Give every meta parameter storage: pages of the file where the plan says so, else memory.

    Args:
        model: As planned.
        plans: Of this rank.
        device: Of parameters outside of FSDP2.
        staging_bytes: Bound of the staging buffers.

    Returns:
        The plans, in which what could not be mapped after all is read, and this rank's shards by fqn.
    """
    pages: dict[str, torch.Tensor] = {}
    final: list[SourcePlan] = []
    for plan in plans:
        dtypes = plan.dtype_of
        unmapped: set[str] = set()
        for item in plan.direct.mapped:
            found = _map(plan.source, item, dtypes[item.fqn])
            if found is None:
                unmapped.add(item.fqn)
            else:
                pages[item.fqn] = found
        final.append(_read_instead(plan, unmapped, staging_bytes) if unmapped else plan)
    dtype_of = {fqn: dtype for plan in plans for fqn, dtype in plan.dtype_of.items()}
    allocate_parameters(model, device, pages=pages, dtype_of=dtype_of)
    _allocate_buffers(model, dtype_of, device)
    return final, {entry.fqn: local_of(entry.tensor) for entry in entries_of(model) if entry.fqn in dtype_of}


def _map(source: Source, item: Mapped, dtype: torch.dtype) -> torch.Tensor | None:
    return source.mapped(item.file, item.start, dtype=dtype, numel=item.nbytes // dtype.itemsize)


def _read_instead(plan: SourcePlan, unmapped: set[str], staging_bytes: int) -> SourcePlan:
    wanted = [dataclasses.replace(t, may_map=False) for t in plan.wanted if t.fqn in unmapped]
    extra = plan_load(wanted, rank=plan.direct.rank, max_read_bytes=read_bytes_of(staging_bytes))
    direct = LoadPlan(
        rank=plan.direct.rank,
        mapped=tuple(item for item in plan.direct.mapped if item.fqn not in unmapped),
        reads=(*plan.direct.reads, *extra.reads),
    )
    return dataclasses.replace(plan, direct=direct)


def _allocate_buffers(model: nn.Module, bound: Mapping[str, torch.dtype], device: torch.device) -> None:
    for entry in entries_of(model):
        if entry.role == "buffer" and entry.fqn in bound and entry.tensor.is_meta:
            entry.replace(torch.empty(entry.tensor.shape, dtype=entry.tensor.dtype, device=device))


def execute(
    plans: Sequence[SourcePlan],
    targets: Mapping[str, torch.Tensor],
    *,
    ranks: Sequence[int],
    device: torch.device,
    staging_bytes: int,
    agreement: Agreement,
    done: Callable[[int], None],
) -> Loaded:
    """Carry out what was planned.

    Args:
        plans: Of this rank.
        targets: This rank's shards by fqn.
        ranks: Global ranks of the call.
        device: Of the mesh, on this rank.
        staging_bytes: Bound of the staging buffers.
        agreement: Of the call.
        done: Told the bytes of each completed read.

    Returns:
        What it did cost.

    Raises:
        CheckpointError: A file cannot be read, or has changed.
        PeerError: Another rank failed.
    """
    for plan in plans:
        done(sum(item.nbytes for item in plan.direct.mapped))
    with phase("read"):
        ring = staging_ring(staging_bytes, device)
        for plan in plans:
            shards = Shards(targets)
            Reading(
                plan.direct,
                source=plan.source,
                ring=ring,
                agreement=agreement,
                done=done,
                place=shards.place,
                in_place=shards.in_place,
            ).run()
        del ring
    if any(plan.rounds or plan.steps for plan in plans):
        with ExitStack() as stack:
            plane = None
            if len(ranks) > 1:
                plane = stack.enter_context(open_data_plane(ranks, device=device, agreement=agreement))
            for plan in plans:
                with phase("exchange"):
                    Exchange(plan.rounds, source=plan.source, targets=targets, plane=plane, done=done).run()
                with phase("convert"):
                    convert(plan.steps, plan.source, place=targets, plane=plane, done=done)
    for plan in plans:
        plan.source.require_unchanged()
    return Loaded(
        storage_bytes=sum(plan.storage_bytes for plan in plans),
        network_bytes=sum(plan.network_bytes for plan in plans),
    )
