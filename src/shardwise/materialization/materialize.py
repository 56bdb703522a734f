"""Fill a model that somebody has sharded, or nobody, from a checkpoint: each rank reads its own bytes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardwise.checkpoint import Source
from shardwise.errors import ConfigurationError
from shardwise.materialization.agreement import Agreement, ranks_of_group
from shardwise.materialization.arguments import (
    argument_lines,
    checkpoint_of,
    kind_of_checkpoint,
    storage_lines,
)
from shardwise.materialization.binding import (
    Binding,
    Bound,
    Rename,
    bind,
    check_bound,
    listed,
    nothing_bound,
    permitted,
)
from shardwise.materialization.buffers import Buffers, equal_buffers, fill_buffers
from shardwise.materialization.collector import resting_collector
from shardwise.materialization.comparing import comparable_lines, comparable_structure
from shardwise.materialization.device import device_of_model
from shardwise.materialization.dtypes import kept_dtypes
from shardwise.materialization.given_buffers import GivenBuffers
from shardwise.materialization.initialise import initialise, refuse_uninitialisable
from shardwise.materialization.layouts import agreed_layouts
from shardwise.materialization.load import Loaded, allocate, execute
from shardwise.materialization.meta import refuse_meta
from shardwise.materialization.open_source import Checkpoint, open_source
from shardwise.materialization.progress import JobProgress, shown_by_default
from shardwise.materialization.reporting import collect_report, origins_of, stored_dtypes
from shardwise.materialization.sight import agreed_sights
from shardwise.materialization.source_plan import CpuStorage, checked_cpu_storage, plan_sources, wanted_of
from shardwise.materialization.staging import default_staging_bytes
from shardwise.materialization.storage import reshard
from shardwise.materialization.stored_ties import aliased_bytes, require_equal_aliases
from shardwise.materialization.structure import Entry, Structure, entries_of
from shardwise.materialization.swapping import refuse_unswappable
from shardwise.materialization.timeouts import timeout_seconds_of
from shardwise.plan import ROUTES
from shardwise.profiling import LoadReport, phase, profile_memory
from shardwise.tensors import floating_dtype

_log = logging.getLogger("shardwise")


@dataclass(frozen=True, slots=True, kw_only=True)
class FillOptions:
    """How values come into a model.

    Args:
        device: Of the mesh, or of a model without one.
        staging_bytes: Bound of the staging buffers, in bytes.
        cpu_storage: Whether shards in host memory may be pages of the file.
        dtype: In which floating point shards are kept, as `kept_dtypes` takes it.
        buffers: Values of buffers that no checkpoint holds.
        route: One of `shardwise.plan.ROUTES`.
        show_progress: On this rank; the first rank's counts.
    """

    device: torch.device
    staging_bytes: int
    cpu_storage: CpuStorage
    dtype: torch.dtype | str | None
    buffers: Buffers
    route: str
    show_progress: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledFromFiles:
    """What a fill did.

    Args:
        loaded: On this rank.
        predicted: For the job.
        origins: Of the tensors that it gave values, by fqn.
        converted: Fqns of those that a conversion of whole tensors made.
        route: That the values took; `"none"` where there were none to read.
        reason: Why it was that one.
    """

    loaded: Loaded
    predicted: dict[str, int]
    origins: dict[str, str]
    converted: tuple[str, ...]
    route: str
    reason: str


def materialize(
    model: nn.Module,
    checkpoint: Checkpoint | None,
    *,
    route: str = "auto",
    missing: str | Sequence[str] = "error",
    dtype: torch.dtype | str | None = None,
    staging_bytes: int | None = None,
    cpu_storage: CpuStorage = "auto",
    rename: Rename = None,
    conversions: Sequence[Any] | None = None,
    buffers: Buffers = None,
    group: dist.ProcessGroup | None = None,
    timeout: float | timedelta | None = None,
    progress: bool | None = None,
    device: torch.device | str | None = None,
    direct_io: bool = False,
) -> LoadReport:
    """Fill a model's parameters and buffers from a checkpoint, each rank reading its own bytes only.

    All ranks of the group call this together; without a process group it fills a model in one process. The model may be
    sharded by `fully_shard`, tensor parallelism, both, or not at all. Parameters on meta get storage and stay the same
    objects, so that optimizers made on them stay valid; parameters with storage are filled in place.

    Args:
        model: Any module. Names behind `torch.compile`, activation checkpointing and PEFT are recognised.
        checkpoint: Directory, safetensors file, hub id, state dict (the first rank's values count; the others may pass
            None or an empty one), a `Source`, or None
            to initialise every parameter.
        route: Who reads what. `"direct"`: every rank its own bytes. `"replicate"`: ranks that keep the same elements read a
            part each and hand it to each other, so that storage is read once. `"node"`: one rank of each node reads for all
            of its node. `"rank0"`: the first rank that sees the files reads for all. `"striped"`: ranks read long runs and
            exchange what they own. `"auto"`: the first of these that fits what ranks see and keep; the report says why.
        missing: What to do about parameters that the checkpoint lacks: `"error"` lists them; `"init"`, or patterns of
            names, lets their modules initialise them, to values that do not depend on the number of ranks.
        dtype: In which floating point parameters on meta are kept: None for their own dtype, `"auto"` for the
            checkpoint's, or a torch dtype or its name. Values are cast while they are read. It counts for parameters that are
            initialised as well; for those `"auto"` is the dtype of most parameters that the checkpoint holds.
        staging_bytes: Bound of the host buffers that bytes pass through which are not read straight into place; None
            is 64 MiB on CPU ranks and 256 MiB on accelerators.
        cpu_storage: `"map"` and `"auto"` let shards in host memory be private pages of the file where it holds them as
            they are wanted; nothing is read before it is touched then. While the model lives, truncating the file ends the
            process with SIGBUS, and overwriting it in place changes the values that were not written since; replacing it by
            a rename is safe. `"copy"` reads everything now.
        rename: From names in the model to names in the checkpoint, as a mapping or a function; each tensor is then stored as
            the model has it.
        conversions: How stored tensors become the model's, as transformers' `WeightRenaming` and `WeightConverter` objects; None
            is what transformers declares for the model, if it is one of its own, and nothing otherwise.
        buffers: Values of buffers that no checkpoint holds, by name or as a function of name and tensor; otherwise
            those on meta are made again by their modules. A buffer that has storage keeps its values, also where they differ
            between ranks: after `to_empty`, which leaves garbage in it, pass them here.
        group: Ranks that take part; None is the default group. Models may differ between groups, as the stages of a pipeline
            do: each group compares, reads and reports its own, and what else the checkpoint holds is no warning then.
        timeout: How long to wait for a rank that does not arrive, in seconds or as a timedelta; None is the group's own timeout.
        progress: Whether the first rank shows a line on standard error; None: if that is a terminal.
        device: Where meta tensors outside of a device mesh go; None is the mesh's, or the model's, or torch's default.
        direct_io: Read a checkpoint's files past the page cache where the file system can (`O_DIRECT`), so that a large one
            does not push other files out of it. Shards of CPU ranks are then copied. Takes up to 8 MiB beside the staging
            buffers: 1 MiB for each thread that reads.

    Returns:
        The report: seconds, bytes and memory peaks of all ranks, and the origin of every tensor.

    Raises:
        CheckpointError: The checkpoint is damaged, lacks tensors or does not fit the model; nothing was allocated.
        ConfigurationError: An argument is unknown or not possible here.
        LeftOnMetaError: A buffer has no values.
        UnsupportedParameterError: Weak references or a graph hold a parameter on meta; nothing was allocated.
        RankError: Ranks differ, one failed, or one did not arrive.
    """
    agreement = Agreement(
        ranks_of_group(group), timeout_seconds=timeout_seconds_of(timeout, group=group), call="materialize"
    )
    target = torch.device(device) if device is not None else device_of_model(model)
    with profile_memory(device=target) as profile, ExitStack() as stack:
        with agreement.phase("check") as check:
            _check_route(route)
            dtype = floating_dtype(dtype, others=(None, "auto"))
            cpu_storage = checked_cpu_storage(cpu_storage, direct_io=direct_io)
            _check_direct_io(checkpoint, direct_io=direct_io)
            reshard(model)
            staging = staging_bytes or default_staging_bytes(target.type)
            kind = kind_of_checkpoint(checkpoint, agreement)
            options = argument_lines(
                checkpoint=kind,
                route=route,
                missing=missing,
                dtype=dtype,
                staging_bytes=staging,
                cpu_storage=cpu_storage,
                device=target.type,
            )
            entries = entries_of(model)
            refuse_unswappable(entries)
            check.same = comparable_structure(
                Structure.of(entries),
                (*storage_lines(entries), *options),
                remedy="Build the model from the same config and pass the same arguments on every rank. Stages of a pipeline "
                "are filled in calls of their own: pass the ranks of a stage as group=.",
            )
        checkpoint = checkpoint_of(checkpoint, kind)
        source = None
        if checkpoint is not None:
            source = open_source(checkpoint, agreement=agreement, direct_io=direct_io).source
        if source is not None and not isinstance(checkpoint, Source):
            stack.callback(source.close)
        with agreement.phase("match names"):
            with resting_collector():
                binding = _bind(model, entries, source, rename, conversions, dtype)
            name = source.name if source is not None else type(model).__name__
            allowed = "init" if source is None else missing
            absent = permitted(
                binding.absent, allowed, name=name, optional=binding.optional, unexpected=binding.unexpected
            )
            check_bound(entries, binding.bound)
            warn_of_unexpected(binding, name, agreement)
        compared_bytes = 0
        if source is not None:
            compared_bytes = require_equal_aliases(
                binding,
                source,
                agreement=agreement,
                staging_bytes=staging,
            )
        fill_options = FillOptions(
            device=target,
            staging_bytes=staging,
            cpu_storage=cpu_storage,
            dtype=dtype,
            buffers=buffers,
            route=route,
            show_progress=shown_by_default() if progress is None else progress,
        )
        filled = fill_from_files(model, binding.bound, absent, fill_options, agreement=agreement)
    with agreement.phase("report"):
        stored = stored_dtypes(list(model.parameters()))
        return collect_report(
            model,
            agreement,
            profile,
            name=name,
            strategy="materialize",
            route=filled.route,
            route_reason=filled.reason,
            storage_bytes=filled.loaded.storage_bytes + compared_bytes,
            network_bytes=filled.loaded.network_bytes,
            retried_reads=filled.loaded.retried_reads,
            predicted={
                **filled.predicted,
                "storage_bytes": filled.predicted["storage_bytes"] + aliased_bytes(binding, source),
            },
            origins=origins_of(entries_of(model), filled.origins),
            converted=filled.converted,
            dtypes={"stored": stored, "compute": stored, "reduce": stored, "optimizer": None},
        )


def fill_from_files(
    model: nn.Module,
    bound: Mapping[str, Bound],
    absent: frozenset[str],
    options: FillOptions,
    *,
    agreement: Agreement,
) -> FilledFromFiles:
    """Allocate what is on meta, read what is bound, initialise what is absent, restore buffers.

    Args:
        model: Sharded or not; equal in structure on all ranks.
        bound: Where values are, by fqn.
        absent: Fqns to initialise; of those that are bound too, what the source has is read over it.
        options: Equal on all ranks but for the device's index and `show_progress`.
        agreement: Of the call.

    Returns:
        What it did cost.

    Raises:
        CheckpointError: A file cannot be read, or has changed.
        LeftOnMetaError: Something has no values.
        RankError: Ranks differ, or one failed.
    """
    ranks, rank = agreement.ranks, agreement.rank
    with agreement.phase("compare plans") as compare:
        entries = entries_of(model)
        refuse_unswappable(entries)
        refuse_uninitialisable(model, absent)
        dtype_of = kept_dtypes(entries, bound, options.dtype)
        with resting_collector():
            wanted = wanted_of(
                model,
                entries,
                bound,
                partial=absent & bound.keys(),
                layouts=agreed_layouts(entries, agreement=agreement),
                device=options.device,
                cpu_storage=options.cpu_storage,
                dtype_of=dtype_of,
            )
            compare.same = comparable_lines(
                "what is to be read",
                [
                    *(line for each in wanted for line in each.lines()),
                    *(f"{fqn}: initialised" for fqn in sorted(absent)),
                ],
                remedy="Pass the same checkpoint, rename, conversions and missing on every rank.",
            )
    with agreement.phase("plan") as plan:
        sights = agreed_sights([each.source for each in wanted], agreement, key="sight")
        with resting_collector():
            plans = plan_sources(
                wanted,
                sights=sights,
                route=options.route,
                rank=rank,
                device=options.device,
                staging_bytes=options.staging_bytes,
                cpu_storage=options.cpu_storage,
            )
        if rank == ranks[0]:
            for each, sight in zip(plans, sights, strict=True):
                # A rank that does not see the files may have been given another path by mistake.
                level = logging.WARNING if sight.blind and not sight.in_memory else logging.INFO
                _log.log(
                    level, "%s: route %s, because %s", each.source.name, each.route.name, each.route.reason
                )
        storage_bytes = sum(each.storage_bytes for each in plans)
        network_bytes = sum(each.network_bytes for each in plans)
        moved_bytes = sum(each.moved_bytes for each in plans)
        own = {
            "storage": storage_bytes,
            "network": network_bytes,
            "whole tensors": max((each.whole_tensor_bytes for each in plans), default=0),
            "moved": moved_bytes,
            "shown": options.show_progress,
        }
        planned = [json.loads(text) for text in agreement.gather("planned", json.dumps(own))]
        kept = {e.fqn for e in entries_of(model, roles=("buffer",)) if not e.tensor.is_meta}
        given = GivenBuffers(options.buffers)
        with phase("buffers"):  # while parameters are on meta a module's own re-run cannot change them
            filled_buffers = fill_buffers(model, given.buffers, bound=bound.keys(), device=options.device)
        # What a buffer with storage holds is this rank's own affair: a counter of its steps may differ.
        plan.same = equal_buffers(model, but=bound.keys() | (kept - given.fqns))
    with agreement.phase("allocate"), resting_collector():
        plans, targets = allocate(
            model,
            plans,
            device=options.device,
            staging_bytes=options.staging_bytes,
            dtype_of=dtype_of,
            rank=rank,
        )
    initialised: tuple[str, ...] = ()
    if absent:
        with agreement.phase("initialise"):
            own_seed = json.dumps(torch.initial_seed()) if rank == ranks[0] else None
            seed = json.loads(agreement.publish("seed", own_seed))
            initialised = initialise(model, absent, ranks=ranks, rank=rank, seed=seed, step=agreement.step)
    progress = JobProgress(
        agreement,
        own_bytes=moved_bytes,
        job_bytes=sum(of_rank["moved"] for of_rank in planned),
        show=planned[0]["shown"],
    )
    with progress, agreement.phase("read"):
        loaded = execute(
            plans,
            targets,
            device=options.device,
            staging_bytes=options.staging_bytes,
            agreement=agreement,
            done=progress.add,
        )
        del targets
        refuse_meta(model)
    predicted = {
        "storage_bytes": sum(of_rank["storage"] for of_rank in planned),
        "network_bytes": sum(of_rank["network"] for of_rank in planned),
        "whole_tensor_bytes": max(of_rank["whole tensors"] for of_rank in planned),
    }
    origins = dict.fromkeys(initialised, "initialised") | dict.fromkeys(bound, "checkpoint")
    origins |= dict.fromkeys(absent & bound.keys(), "derived")  # its further rows are new
    return FilledFromFiles(
        loaded=loaded,
        predicted=predicted,
        origins=origins | dict.fromkeys(filled_buffers, "recomputed"),
        converted=tuple(tensor.fqn for each in plans for tensor in each.wanted.converted),
        route=" + ".join(dict.fromkeys(each.route.name for each in plans)) or "none",
        reason="; ".join(dict.fromkeys(each.route.reason for each in plans)) or "nothing was to be read",
    )


def _check_route(route: str) -> None:
    if route not in ROUTES:
        raise ConfigurationError(f"route: expected one of {', '.join(ROUTES)}, got {route!r}")


def _check_direct_io(checkpoint: Checkpoint | None, *, direct_io: bool) -> None:
    if direct_io and not isinstance(checkpoint, (str, os.PathLike)):
        raise ConfigurationError(
            f"direct_io=True: expected a directory, a file or a hub id, got {type(checkpoint).__name__}. A source says itself how "
            "it reads: SafetensorsSource.open(path, direct_io=True)."
        )


def _bind(
    model: nn.Module,
    entries: tuple[Entry, ...],
    source: Source | None,
    rename: Rename,
    conversions: Sequence[Any] | None,
    dtype: torch.dtype | str | None,
) -> Binding:
    if source is None:
        return nothing_bound(entries)
    return bind(model, entries, source, rename=rename, conversions=conversions, dtype=dtype)


def warn_of_unexpected(binding: Binding, name: str, agreement: Agreement) -> None:
    """Log, once in the call, what a checkpoint holds that the model does not take.

    No warning where a part of the job's ranks makes the call: they may be a stage of a pipeline, and the rest is for others.
    """
    if binding.unexpected and agreement.rank == agreement.ranks[0]:
        is_part = dist.is_initialized() and len(agreement.ranks) < dist.get_world_size()
        level = logging.INFO if is_part else logging.WARNING
        _log.log(level, "%s holds tensors that the model does not take: %s", name, listed(binding.unexpected))
