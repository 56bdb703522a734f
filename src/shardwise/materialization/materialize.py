"""Fill a model that somebody has sharded, or nobody, from a checkpoint: each rank reads its own bytes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardwise.checkpoint import Source
from shardwise.errors import ConfigurationError, listed
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.argument_kinds import check_kinds, checked_device
from shardwise.materialization.arguments import (
    argument_lines,
    checkpoint_of,
    kind_of_checkpoint,
    storage_lines,
)
from shardwise.materialization.begin_call import begin_call
from shardwise.materialization.binding import (
    Binding,
    Rename,
    bind,
    check_bound,
    nothing_bound,
    permitted,
)
from shardwise.materialization.buffers import Buffers
from shardwise.materialization.collector import find_dropped, resting_collector
from shardwise.materialization.comparing import comparable_structure
from shardwise.materialization.cpu_storage import CpuStorage, checked_cpu_storage
from shardwise.materialization.device import device_of_model
from shardwise.materialization.from_files import FillOptions, fill_from_files
from shardwise.materialization.loading_hooks import warn_of_loading_hooks
from shardwise.materialization.open_source import Checkpoint, open_source
from shardwise.materialization.progress import shown_by_default
from shardwise.materialization.reporting import collect_report, origins_of, stored_dtypes
from shardwise.materialization.staging import default_staging_bytes
from shardwise.materialization.storage import local_bytes_of, reshard
from shardwise.materialization.stored_ties import aliased_bytes, require_equal_aliases
from shardwise.materialization.structure import Entry, Structure, entries_of
from shardwise.materialization.swapping import refuse_unswappable
from shardwise.materialization.timeouts import timeout_seconds_of
from shardwise.plan import check_route
from shardwise.profiling import LoadReport, profile_memory
from shardwise.tensors import floating_dtype

_log = logging.getLogger("shardwise")


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
        dtype: In which floating point parameters on meta are kept, but for those of 8 bits: None for their own dtype, `"auto"` for the
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
            does not push other files out of it; what is in it already comes from there. Shards of CPU ranks are then copied. Takes up
            to 8 MiB beside the staging buffers, 16 MiB on accelerators: 1 MiB for each thread that reads.

    Returns:
        The report: seconds, bytes and memory peaks of all ranks, and the origin of every tensor.

    Raises:
        CheckpointError: The checkpoint is damaged, lacks tensors or does not fit the model; nothing was allocated.
        ConfigurationError: An argument is unknown or not possible here.
        LeftOnMetaError: A buffer has no values.
        UnsupportedParameterError: Weak references or a graph hold a parameter on meta; nothing was allocated.
        RankError: Ranks differ, one failed, or one did not arrive.
    """
    agreement = begin_call("materialize", group=group)
    with agreement.phase("arguments"):  # a rank that refuses one tells the others, who wait for it
        agreement.timeout_seconds = timeout_seconds_of(timeout, group=group)
        check_kinds(
            model,
            checkpoint,
            missing=missing,
            rename=rename,
            conversions=conversions,
            buffers=buffers,
            staging_bytes=staging_bytes,
        )
        target = checked_device(device) if device is not None else device_of_model(model)
    find_dropped()
    with ExitStack() as stack:
        stack.enter_context(agreement.whole_call())
        profile = stack.enter_context(profile_memory(device=target, proportional=False))
        with agreement.phase("check") as check:
            check_route(route)
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
            with resting_collector():
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
                binding.absent,
                allowed,
                name=name,
                optional=binding.optional,
                unexpected=binding.unexpected,
                untied=binding.untied,
            )
            check_bound(entries, binding.bound)
            warn_of_unexpected(binding, name, agreement)
            if source is not None and agreement.rank == agreement.ranks[0]:
                warn_of_loading_hooks(model)
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
            compares_kept_buffers=False,
            route=route,
            show_progress=shown_by_default() if progress is None else progress,
        )
        filled = fill_from_files(model, binding.bound, absent, fill_options, agreement=agreement)
    with agreement.phase("report"):
        entries = entries_of(model)
        parameters = [entry.tensor for entry in entries if entry.role == "parameter"]
        stored = stored_dtypes(parameters)
        return collect_report(
            model,
            agreement,
            profile,
            name=name,
            strategy="materialize",
            route=filled.route,
            route_reason=filled.reason,
            shard_bytes=local_bytes_of(parameters),
            storage_bytes=filled.loaded.storage_bytes + compared_bytes,
            network_bytes=filled.loaded.network_bytes,
            retried_reads=filled.loaded.retried_reads,
            predicted={
                **filled.predicted,
                "storage_bytes": filled.predicted["storage_bytes"] + aliased_bytes(binding, source),
            },
            origins=origins_of(entries, filled.origins),
            converted=filled.converted,
            dtypes={"stored": stored, "compute": stored, "reduce": stored, "optimizer": None},
        )


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
