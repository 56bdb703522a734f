"""Bring values into a model of which it is known where they are: plan, allocate, initialise, read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from shardwise.materialization.agreement import Agreement
from shardwise.materialization.binding import Bound
from shardwise.materialization.buffers import Buffers, equal_buffers, fill_buffers
from shardwise.materialization.collector import resting_collector
from shardwise.materialization.comparing import comparable_lines
from shardwise.materialization.cpu_storage import CpuStorage
from shardwise.materialization.dtypes import kept_dtypes
from shardwise.materialization.given_buffers import GivenBuffers
from shardwise.materialization.initialise import initialise, refuse_uninitialisable
from shardwise.materialization.layouts import agreed_layouts
from shardwise.materialization.load import Loaded, allocate, execute
from shardwise.materialization.meta import refuse_meta
from shardwise.materialization.progress import JobProgress
from shardwise.materialization.sight import agreed_sights
from shardwise.materialization.source_plan import plan_sources
from shardwise.materialization.storage import device_of_shards
from shardwise.materialization.structure import entries_of, renewed
from shardwise.materialization.swapping import refuse_unswappable
from shardwise.materialization.wanted import wanted_of
from shardwise.profiling import phase

_log = logging.getLogger("shardwise")
_PLAIN_ATTRIBUTES = (
    "No file holds what a module keeps as a plain attribute. Make it a buffer (register_buffer(name, tensor, persistent=False)), "
    "which the module's own code makes again, or take global rank 0's with load_pretrained(defer=False)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FillOptions:
    """How values come into a model.

    Args:
        device: Of the mesh, or of a model without one.
        staging_bytes: Bound of the staging buffers, in bytes.
        cpu_storage: Whether shards in host memory may be pages of the file.
        dtype: In which floating point shards are kept, as `kept_dtypes` takes it.
        buffers: Values of buffers that no checkpoint holds.
        compares_kept_buffers: Whether buffers that have values already must be equal on all ranks: a counter of a rank's own steps is
            not, in a model that was trained.
        route: One of `shardwise.plan.ROUTES`.
        show_progress: On this rank; the first rank's counts.
    """

    device: torch.device
    staging_bytes: int
    cpu_storage: CpuStorage
    dtype: torch.dtype | str | None
    buffers: Buffers
    compares_kept_buffers: bool
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
        refuse_uninitialisable(model, absent)  # which may run modules' own code on values
        with resting_collector():
            entries = entries_of(model)
            refuse_unswappable(entries)
            on_host = device_of_shards(model, options.device).type == "cpu"
            dtype_of = kept_dtypes(entries, bound, options.dtype)
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
                on_host=on_host,
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
        kept = {e.fqn for e in entries if e.role == "buffer" and not e.tensor.is_meta}
        given = GivenBuffers(options.buffers)
        with phase("buffers"):  # while parameters are on meta a module's own re-run cannot change them
            filled_buffers = fill_buffers(
                model, entries, given.buffers, bound=bound.keys(), device=options.device
            )
        entries = renewed(entries)  # parameters stay the same objects from here on
        parameters = {id(entry.tensor) for entry in entries if entry.role == "parameter"}
        refuse_meta(
            (e for e in entries if e.role == "attribute" and id(e.tensor) not in parameters),
            remedy=_PLAIN_ATTRIBUTES,
        )
        own_affair = frozenset() if options.compares_kept_buffers else kept - given.fqns
        plan.same = equal_buffers(entries, but=bound.keys() | own_affair)
    with agreement.phase("allocate"), resting_collector():
        plans, targets = allocate(
            model,
            entries,
            plans,
            device=options.device,
            on_host=on_host,
            staging_bytes=options.staging_bytes,
            dtype_of=dtype_of,
            agreement=agreement,
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
            on_host=on_host,
            staging_bytes=options.staging_bytes,
            agreement=agreement,
            done=progress.add,
        )
        del targets
        refuse_meta(
            entries_of(model),
            remedy="Please report it: what the load cannot fill is refused before it reads.",
        )
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
