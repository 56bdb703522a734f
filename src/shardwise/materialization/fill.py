"""Fill a model that was sharded on meta from the full tensors of one rank."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from shardwise.checkpoint import StateDictSource
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.data_plane import open_data_plane
from shardwise.materialization.layouts import layout_of
from shardwise.materialization.meta import refuse_meta
from shardwise.materialization.out_of_memory import naming_out_of_memory
from shardwise.materialization.scatter import Scatter
from shardwise.materialization.storage import allocate_parameters, local_of
from shardwise.materialization.structure import Entry, entries_of
from shardwise.materialization.swapping import refuse_unswappable
from shardwise.plan import Layout, PlannedTensor, ScatterPlan, plan_scatter
from shardwise.tensors import TensorSpec, dtype_name

_DIRECT_FROM_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What a fill did on this rank.

    Args:
        plan: What was carried out.
        received_bytes: Payload that reached this rank over the network.
    """

    plan: ScatterPlan
    received_bytes: int


def fill_from_source(
    model: nn.Module,
    source: StateDictSource,
    *,
    ranks: Sequence[int],
    source_rank: int,
    device: torch.device,
    staging_bytes: int,
    agreement: Agreement,
    only: Collection[str] | None = None,
) -> Filled:
    """Allocate this rank's shards and bring the source rank's values into them.

    Args:
        model: Sharded on meta; equal in structure on all ranks.
        source: Full values on the source rank, as `take_values` returned them; empty elsewhere. Emptied on the way.
        ranks: Global ranks of the call.
        source_rank: The one whose values win.
        device: Of the mesh, on this rank.
        staging_bytes: Bound of the staging buffers of any rank, in bytes.
        agreement: Of the call.
        only: Names of the parameters to fill, where the others, and the buffers that are on meta on the source rank too, get
            their values elsewhere.

    Returns:
        The plan that was carried out, and its bytes.

    Raises:
        CheckpointError: The source rank lacks a tensor or its values.
        LeftOnMetaError: A plain tensor exists on this rank alone, without values.
        PeerError: Another rank failed.
    """
    is_source = agreement.rank == source_rank
    with agreement.phase("describe"):
        entries = entries_of(model)
        refuse_unswappable(entries)
        parameters = [
            entry for entry in entries if entry.role == "parameter" and (only is None or entry.fqn in only)
        ]
        del entries  # the others are replaced
        planned = [
            PlannedTensor(spec=_spec(entry), layout=layout_of(entry.tensor, ranks)) for entry in parameters
        ]
        if is_source:
            for tensor in planned:
                source.require(tensor.spec)
        shared = _plain_tensors(model, source, agreement, is_source=is_source, skip_meta=only is not None)
        planned += [PlannedTensor(spec=plain.spec, layout=Layout.replicated(ranks)) for plain in shared]
        plan = plan_scatter(
            planned,
            ranks=ranks,
            source_rank=source_rank,
            staging_bytes=staging_bytes,
            # In host memory a collective can read the source's tensor and write the shard itself.
            direct_from_bytes=_DIRECT_FROM_BYTES if device.type == "cpu" else None,
        )
    with agreement.phase("allocate for the source rank's values" if only is not None else "allocate"):
        with naming_out_of_memory("the shards", device=device, rank=agreement.rank):
            allocate_parameters(model, parameters, device)
        targets = {entry.fqn: local_of(entry.tensor) for entry in parameters}
        targets |= _place_plain_tensors(model, shared, source, device, is_source=is_source)
    with agreement.phase("transfer"):
        with ExitStack() as stack:
            plane = None
            if plan.buckets:
                plane = stack.enter_context(open_data_plane(ranks, device=device, agreement=agreement))
            scatter = Scatter(
                plan,
                source=source,
                targets=targets,
                rank=agreement.rank,
                device=plane.device if plane is not None else device,
            )
            scatter.run(plane)
        if only is None:
            refuse_meta(
                entries_of(model),
                remedy="The source rank has no such tensor: build the model there the way the other ranks did.",
            )
    return Filled(
        plan=plan,
        received_bytes=plan.bytes_to_rank[list(ranks).index(agreement.rank)],
    )


def _spec(entry: Entry) -> TensorSpec:
    return TensorSpec(fqn=entry.fqn, shape=tuple(entry.tensor.shape), dtype=entry.tensor.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlainTensor:
    """A buffer or plain tensor attribute of the source rank's model, and all names that it has there."""

    spec: TensorSpec
    fqns: tuple[str, ...]


def _plain_tensors(
    model: nn.Module, source: StateDictSource, agreement: Agreement, *, is_source: bool, skip_meta: bool
) -> list[_PlainTensor]:
    """Return what the source rank has besides parameters; its dtypes and aliases win over the other ranks'."""
    text = None
    if is_source:
        named = [
            pair for pair in _names_of_plain_tensors(model) if not (skip_meta and pair[0].tensor.is_meta)
        ]
        for entry, _ in named:
            source.require(_spec(entry))
        text = json.dumps([(fqns, e.tensor.shape, dtype_name(e.tensor.dtype)) for e, fqns in named])
    return [
        _PlainTensor(
            spec=TensorSpec(fqn=fqns[0], shape=tuple(shape), dtype=getattr(torch, dtype)), fqns=tuple(fqns)
        )
        for fqns, shape, dtype in json.loads(agreement.publish("buffers", text))
    ]


def _names_of_plain_tensors(model: nn.Module) -> list[tuple[Entry, list[str]]]:
    named: dict[int, tuple[Entry, list[str]]] = {}
    for entry in entries_of(model):
        if entry.role != "parameter":
            _, fqns = named.setdefault(id(entry.tensor), (entry, []))
            fqns += [slot.fqn for slot in entry.slots]
    return list(named.values())


def _place_plain_tensors(
    model: nn.Module,
    shared: Sequence[_PlainTensor],
    source: StateDictSource,
    device: torch.device,
    *,
    is_source: bool,
) -> dict[str, torch.Tensor]:
    """Put buffers and plain tensors on the device: the source rank's own, and empty ones to be filled elsewhere."""
    placed: dict[str, torch.Tensor] = {}
    for plain in shared:
        if is_source:
            tensor = source.tensor(plain.spec.fqn).to(device)
        else:
            tensor = torch.empty(plain.spec.shape, dtype=plain.spec.dtype, device=device)
        placed |= dict.fromkeys(plain.fqns, tensor)
    replaced: dict[int, torch.Tensor] = {}
    for entry in entries_of(model):
        if entry.role == "parameter":
            continue
        for slot in entry.slots:
            # An attribute that only this rank has follows the buffer that it is.
            found = placed.get(slot.fqn, replaced.get(id(entry.tensor)))
            if found is not None:
                replaced.setdefault(id(entry.tensor), found)
                entry._replace(slots=(slot,)).replace(found)
    return {} if is_source else {plain.spec.fqn: placed[plain.spec.fqn] for plain in shared}
