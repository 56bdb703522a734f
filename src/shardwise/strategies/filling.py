"""Values for a model that is being wrapped: from the source rank, from files, or both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from shardwise.errors import LeftOnMetaError, listed
from shardwise.materialization import (
    Agreement,
    Entry,
    FilledFromFiles,
    FillOptions,
    allocate_buffers,
    entries_of,
    fill_from_files,
    fill_from_source,
    naming_out_of_memory,
    resting_collector,
    shown_by_default,
    take_values,
)
from shardwise.profiling import phase
from shardwise.strategies.deferred import Deferred
from shardwise.strategies.mesh import source_rank_of
from shardwise.strategies.sharding import shard_units
from shardwise.strategies.wrap_options import WrapOptions
from shardwise.strategies.wrapping import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What filling a model did cost: on this rank, and for the job as planned.

    Args:
        route: How the values came.
        reason: Why they came that way.
        storage_bytes: That this rank requested.
        network_bytes: That this rank received.
        retried_reads: Of this rank.
        predicted: For the job.
        origins: Of the tensors that came from files or were made, by fqn.
        converted: Fqns of those that a conversion of whole tensors made.
    """

    route: str
    reason: str
    storage_bytes: int
    network_bytes: int
    retried_reads: int
    predicted: dict[str, int]
    origins: dict[str, str]
    converted: tuple[str, ...]


_NOTHING_MOVED = Cost(
    route="none",
    reason="every rank had loaded the values",
    storage_bytes=0,
    network_bytes=0,
    retried_reads=0,
    predicted={"storage_bytes": 0, "network_bytes": 0},
    origins={},
    converted=(),
)


def shard_and_fill(
    model: nn.Module,
    units: tuple[Unit, ...],
    options: WrapOptions,
    deferred: Deferred,
    agreement: Agreement,
    device: torch.device,
) -> Cost:
    """Shard a model on meta and give every rank the values of its shards: from files, from the source rank, or both.

    Args:
        model: Not sharded; with values on the source rank only, or nowhere.
        units: That are sharded each by itself.
        options: Of the strategy.
        deferred: Values that are still in files.
        agreement: Of the call.
        device: Of the mesh, on this rank.

    Returns:
        What it did cost.

    Raises:
        LeftOnMetaError: Of a parameter neither the source rank nor a file has values.
        CheckpointError: A file cannot be read, or has changed.
        RankError: Ranks differ, or one failed.
    """
    source_rank = source_rank_of(options.mesh)
    with agreement.phase("shard"), resting_collector():
        entries = entries_of(model)
        is_source = agreement.rank == source_rank
        held = _held_by_source(entries, deferred, agreement, is_source=is_source)
        with phase("to meta"):
            source = take_values(entries, keep=is_source and (held is None or bool(held)))
        del entries  # they hold the full tensors
        with phase("fully_shard"):
            shard_units(model, units, options)
    sent = None
    if held is None or held:
        sent = fill_from_source(
            model,
            source,
            ranks=agreement.ranks,
            source_rank=source_rank,
            device=device,
            staging_bytes=options.staging_bytes,
            agreement=agreement,
            only=held,
        )
    if held is None and sent is not None:
        return Cost(
            route="rank0",
            reason="the source rank had loaded the values",
            storage_bytes=0,
            network_bytes=sent.received_bytes,
            retried_reads=0,
            predicted={"storage_bytes": 0, "network_bytes": sent.plan.network_bytes},
            origins={},
            converted=(),
        )
    del source
    read = _read_deferred(model, options, deferred, held or frozenset(), agreement, device)
    route, reason = read.route, read.reason
    if deferred.blank:
        route, reason = "none", "the values come from the state of a training"
    elif not deferred.bound:
        route, reason = "none", "no checkpoint holds the model's values: they were made"
    sent_bytes = sent.plan.network_bytes if sent is not None else 0
    return Cost(
        route=route if sent is None else f"{route} + rank0",
        reason=reason if sent is None else f"{reason}; the source rank had values of the rest",
        storage_bytes=read.loaded.storage_bytes,
        network_bytes=read.loaded.network_bytes + (sent.received_bytes if sent is not None else 0),
        retried_reads=read.loaded.retried_reads,
        predicted={**read.predicted, "network_bytes": read.predicted["network_bytes"] + sent_bytes},
        origins=read.origins,
        converted=read.converted,
    )


def fill_whole(model: nn.Module, options: WrapOptions, deferred: Deferred, agreement: Agreement) -> Cost:
    """Give every rank the whole values of what is still on meta: new models, and adapters."""
    if not deferred.bound and not deferred.absent:
        return _NOTHING_MOVED
    read = _read_deferred(model, options, deferred, frozenset(), agreement, torch.device("cpu"))
    return dataclasses.replace(
        _NOTHING_MOVED,
        reason="every rank had loaded or made the values",
        storage_bytes=read.loaded.storage_bytes,
        network_bytes=read.loaded.network_bytes,
        retried_reads=read.loaded.retried_reads,
        predicted=read.predicted,
        origins=read.origins,
        converted=read.converted,
    )


def _read_deferred(
    model: nn.Module,
    options: WrapOptions,
    deferred: Deferred,
    held: frozenset[str],
    agreement: Agreement,
    device: torch.device,
) -> FilledFromFiles:
    with ExitStack() as stack:
        for source_of_files in {id(bound.source): bound.source for bound in deferred.bound.values()}.values():
            stack.callback(source_of_files.close)
        bound = {fqn: bound for fqn, bound in deferred.bound.items() if fqn not in held}
        absent = deferred.absent - held
        if deferred.blank:
            with (
                agreement.phase("blank buffers"),
                naming_out_of_memory("the buffers", device=device, rank=agreement.rank),
            ):
                allocate_buffers(entries_of(model, roles=("buffer",)), bound.keys(), device)
            bound, absent = {}, frozenset()
        return fill_from_files(
            model,
            bound,
            absent,
            FillOptions(
                device=device,
                staging_bytes=options.staging_bytes,
                cpu_storage=options.cpu_storage,
                dtype=None,
                buffers=None,
                compares_kept_buffers=not deferred.blank,  # whose buffers with storage are to be read yet
                route=options.route,
                show_progress=shown_by_default(),
            ),
            agreement=agreement,
        )


def _held_by_source(
    entries: Sequence[Entry], deferred: Deferred, agreement: Agreement, *, is_source: bool
) -> frozenset[str] | None:
    """Return the parameters that the source rank has values of; None where nothing of the model is in files.

    Raises:
        LeftOnMetaError: Of a parameter neither the source rank nor a file has values.
    """
    parameters = [entry for entry in entries if entry.role == "parameter"]
    text = None
    if is_source:
        held = [entry.fqn for entry in parameters if not entry.tensor.is_meta]
        text = json.dumps(held if deferred.bound or deferred.absent else None)
    found = json.loads(agreement.publish("held by the source rank", text))
    if found is None:
        return None
    _refuse_unbound(parameters, frozenset(found), deferred)
    return frozenset(found)


def _refuse_unbound(parameters: Sequence[Entry], held: frozenset[str], deferred: Deferred) -> None:
    unbound = [
        entry.fqn
        for entry in parameters
        if entry.fqn not in held and entry.fqn not in deferred.bound and entry.fqn not in deferred.absent
    ]
    if unbound:
        raise LeftOnMetaError(
            f"expected values or a checkpoint for every parameter, got neither for {listed(unbound)}: they are on meta on the "
            "source rank. Parameters that were made after load_pretrained (adapters, resized embeddings) need values: "
            "use load_pretrained(defer=False), or build them off meta."
        )
