"""The one wrap that both strategies use: check, shard, fill, rebind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from shardwise.errors import CheckpointError, LeftOnMetaError
from shardwise.materialization import (
    Agreement,
    Bound,
    Comparable,
    CpuStorage,
    Entry,
    FilledFromFiles,
    FillOptions,
    Structure,
    allocate_buffers,
    clean_fqn,
    collect_report,
    comparable_digests,
    comparable_structure,
    device_of,
    digest_of,
    entries_of,
    fill_from_files,
    fill_from_source,
    listed,
    local_bytes_of,
    origins_of,
    shown_by_default,
    stored_dtypes,
    take_values,
)
from shardwise.profiling import LoadReport, phase, profile_memory
from shardwise.strategies.fsdp_config import FSDPConfig
from shardwise.strategies.mesh import ranks_of, source_rank_of
from shardwise.strategies.optimizers import DetachedOptimizer, check_optimizers, drop_references
from shardwise.strategies.placement import keeps_a_part, log_placements, refuse_reshard, thrifty_placement
from shardwise.strategies.wrapping import (
    Unit,
    apply_checkpointing,
    ignored_parameters,
    plan_units,
    refuse_aliases,
    refuse_mixed_dtypes,
    refuse_wrapped,
)
from shardwise.tensors import dtype_name

_SAMPLED_ELEMENTS = 64  # per parameter, in the comparison of values between ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class WrapOptions:
    """How a strategy wraps.

    Args:
        strategy: Its name, for the report.
        mesh: One axis, or replicate x shard.
        config: Checked `fsdp_config`.
        policy: Compute and reduce dtypes.
        efficient: Shard on meta and fill from the source rank; otherwise shard what every rank holds.
        staging_bytes: Bound of the staging buffers, in bytes.
        cpu_storage: Whether shards in host memory may be pages of the file.
        route: That files are read on.
        timeout_seconds: How long to wait for other ranks.
    """

    strategy: str
    mesh: DeviceMesh
    config: FSDPConfig
    policy: MixedPrecisionPolicy
    efficient: bool
    staging_bytes: int
    cpu_storage: CpuStorage
    route: str
    timeout_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Deferred:
    """What is on record of a model whose values are still in its checkpoints.

    Args:
        bound: Where values are, by fqn.
        absent: Fqns of parameters that were permitted to be absent from the checkpoints.
        blank: None of them is read or initialised: the caller of the wrap does that.
    """

    bound: Mapping[str, Bound]
    absent: frozenset[str]
    blank: bool


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


def wrap(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    options: WrapOptions,
    *,
    name: str,
    origins: Mapping[str, str],
    deferred: Deferred,
    refuse: Callable[[], None],
    shard: Callable[[], None] | None = None,
) -> LoadReport:
    """Bring a model into FSDP2 form in place and rebind its optimizers.

    Args:
        model: Not sharded; on the efficient path it needs values on the source rank only.
        optimizers: Made on its parameters, not stepped; changed in place.
        options: Of the strategy; equal on all ranks.
        name: Of the model, for the report.
        origins: Of tensors that have values already, by fqn, where they are known; the source rank's count.
        deferred: Values that are still in files.
        refuse: Raises what the strategy itself has against the model; called once the model is known not to be sharded.
        shard: Shards the model and rebinds its optimizers in place of this module's own way; needs values on every
            rank, so only where `options.efficient` is off.

    Returns:
        The report of all ranks.

    Raises:
        ModelError: The model cannot be sharded as it is.
        OptimizerError: An optimizer cannot be rebound.
        RankError: Ranks differ, one of them failed, or one did not arrive.
    """
    ranks, device = ranks_of(options.mesh), device_of(options.mesh)
    agreement = Agreement(ranks, timeout_seconds=options.timeout_seconds, call="wrap_model")
    with profile_memory(device=device, proportional=False) as profile:
        with agreement.phase("check") as check:
            refuse_wrapped(model)
            refuse()
            records, units, structure = _check(model, optimizers, options, checkpointing=shard is None)
            check.same = _comparable_structure(structure, units, options)
        with _rebinding(records if shard is None else (), model):
            if options.efficient:
                cost = _shard_and_fill(model, units, options, deferred, agreement, device)
            else:
                cost = _fill_whole(model, options, deferred, agreement)
                _shard_values(model, agreement, shard or (lambda: _fully_shard(model, units, options)))
        with agreement.phase("finish"):
            own = json.dumps(origins) if agreement.rank == source_rank_of(options.mesh) else None
            known: dict[str, str] = json.loads(agreement.publish("origins", own))
    with agreement.phase("report"):
        return collect_report(
            model,
            agreement,
            profile,
            name=name,
            strategy=options.strategy,
            route=cost.route,
            route_reason=cost.reason,
            shard_bytes=local_bytes_of(model),
            storage_bytes=cost.storage_bytes,
            network_bytes=cost.network_bytes,
            retried_reads=cost.retried_reads,
            predicted=cost.predicted,
            origins=origins_of(entries_of(model, roles=("parameter", "buffer")), known | cost.origins),
            converted=cost.converted,
            dtypes=_dtypes(model, options, optimizers),
        )


def _check(
    model: nn.Module, optimizers: Sequence[Optimizer], options: WrapOptions, *, checkpointing: bool
) -> tuple[tuple[DetachedOptimizer, ...], tuple[Unit, ...], Structure]:
    # Entries hold the full tensors: none of them is handed on.
    entries = entries_of(model)
    refuse_aliases(entries)
    records = check_optimizers(model, optimizers)
    if checkpointing and options.config.activation_checkpointing:
        apply_checkpointing(model, options.config)
        entries = entries_of(model)
    units = plan_units(model, entries, options.config)
    ignored = ignored_parameters(entries, options.config)
    refuse_mixed_dtypes(model, units, ignored)
    refuse_reshard(entries, ignored, options.config, shard_ranks=options.mesh.size(-1))
    return records, units, Structure.of(entries)


def _comparable_structure(structure: Structure, units: tuple[Unit, ...], options: WrapOptions) -> Comparable:
    # Units decide which collectives a forward runs: ranks that differ in them would hang in the first one.
    unit_lines = (f"unit {' + '.join(map(clean_fqn, unit.fqns))}" for unit in units)
    return comparable_structure(
        structure,
        (*unit_lines, *_option_lines(options)),
        remedy=(
            "Build the model from the same config, with the same dtype, and make the strategy with the same "
            "arguments on every rank."
        ),
    )


def _option_lines(options: WrapOptions) -> tuple[str, ...]:
    return (
        f"option strategy: {options.strategy}",
        f"option memory_efficient_init: {options.efficient}",
        f"option mesh: {tuple(options.mesh.shape)}",
        f"option reshard_after_forward: {options.config.reshard}",
        f"option activation_checkpointing: {options.config.activation_checkpointing}",
        f"option ignored_params: {', '.join(sorted(options.config.ignored_params))}",
        f"option shard_placement_fn: {options.config.shard_placement_fn is not None}",
        f"option cpu_offload: {type(options.config.offload_policy).__name__}",
        f"option mixed precision: {options.policy}",
        f"option staging_bytes: {options.staging_bytes}",
        f"option cpu_storage: {options.cpu_storage}",
        f"option route: {options.route}",
    )


def _shard_and_fill(
    model: nn.Module,
    units: tuple[Unit, ...],
    options: WrapOptions,
    deferred: Deferred,
    agreement: Agreement,
    device: torch.device,
) -> Cost:
    source_rank = source_rank_of(options.mesh)
    with agreement.phase("shard"):
        held = _held_by_source(model, deferred, agreement, is_source=agreement.rank == source_rank)
        with phase("to meta"):
            source = take_values(model, keep=agreement.rank == source_rank)
        with phase("fully_shard"):
            _fully_shard(model, units, options)
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


def _fill_whole(model: nn.Module, options: WrapOptions, deferred: Deferred, agreement: Agreement) -> Cost:
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
            with agreement.phase("blank buffers"):
                allocate_buffers(model, bound.keys(), device)
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
                route=options.route,
                show_progress=shown_by_default(),
            ),
            agreement=agreement,
        )


def _held_by_source(
    model: nn.Module, deferred: Deferred, agreement: Agreement, *, is_source: bool
) -> frozenset[str] | None:
    """Return the parameters that the source rank has values of; None where nothing of the model is in files.

    Raises:
        LeftOnMetaError: Of a parameter neither the source rank nor a file has values.
    """
    parameters = entries_of(model, roles=("parameter",))
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


def _shard_values(model: nn.Module, agreement: Agreement, shard: Callable[[], None]) -> None:
    with agreement.phase("compare values") as compare:
        compare.same = _comparable_values(entries_of(model))
    with agreement.phase("shard"), phase("fully_shard"):
        shard()


def _fully_shard(model: nn.Module, units: tuple[Unit, ...], options: WrapOptions) -> None:
    config = options.config
    entries = entries_of(model, roles=("parameter",))
    ignored = ignored_parameters(entries, config)
    for parameter in ignored:
        if not parameter.is_meta:  # FSDP2 moves what it manages, and leaves these where they are
            parameter.data = parameter.data.to(device_of(options.mesh))
    placement = config.shard_placement_fn
    shard_ranks = options.mesh.size(-1)
    if placement is None and not keeps_a_part(config.reshard, shard_ranks=shard_ranks):  # see refuse_reshard
        placement = thrifty_placement(shard_ranks)
        if dist.get_rank() == source_rank_of(options.mesh):
            log_placements(entries, ignored, shard_ranks=shard_ranks)
    del entries  # they hold the full tensors
    shard = partial(
        fully_shard,
        mesh=options.mesh,
        shard_placement_fn=placement,
        offload_policy=config.offload_policy,
        ignored_params=ignored,
    )
    for unit in units:
        modules = [model.get_submodule(fqn) for fqn in unit.fqns]
        reshard = False if unit.keep_gathered and config.reshard is None else config.reshard
        policy = options.policy
        if unit.own_dtype:
            policy = dataclasses.replace(policy, param_dtype=None, cast_forward_inputs=False)
        shard(modules if len(modules) > 1 else modules[0], reshard_after_forward=reshard, mp_policy=policy)
        _reduce_what_a_rank_has_not_used(modules)
    # What is left to the root is needed first in backward: FSDP2 then keeps it gathered unless told otherwise.
    reshard = None if isinstance(config.reshard, bool) else config.reshard
    shard(model, reshard_after_forward=reshard, mp_policy=options.policy)
    if not units:
        _reduce_what_a_rank_has_not_used([model])


def _reduce_what_a_rank_has_not_used(modules: Sequence[nn.Module]) -> None:
    """Let ranks reduce the same gradients of a unit though each has run other parts of it.

    Experts that are modules of their own, as on transformers 4.57, run only where a rank's tokens reach them. Without this ranks
    exchange buffers of different sizes, and gloo ends the process. Units without a list of modules keep "no gradient" for what
    was not used.
    """
    has_list = any(isinstance(inner, nn.ModuleList) for module in modules for inner in module.modules())
    allow = getattr(modules[0], "set_reduce_scatter_unused_params", None)  # torch 2.13 has it
    if has_list and allow is not None:
        allow(True, recurse=False)


def _comparable_values(entries: tuple[Entry, ...]) -> Comparable:
    """Sample every tensor's values: ranks that were seeded or loaded differently would train a mixture of models."""
    samples: dict[str, str] = {}
    for entry in entries:
        if entry.role == "attribute":
            continue
        if entry.tensor.is_meta:
            raise CheckpointError(
                f"memory_efficient_init=False: expected values of {entry.fqn} on every rank, got a tensor on meta. Load "
                "the model with this strategy's load_pretrained, or use memory_efficient_init=True, where global rank "
                "0 alone needs values."
            )
        flat = entry.tensor.detach().reshape(-1)
        samples[entry.fqn] = digest_of(flat[:: max(1, flat.numel() // _SAMPLED_ELEMENTS)])
    return comparable_digests(
        "the values of the model",
        samples,
        explain=_differing_names,
        remedy=(
            "Without memory_efficient_init every rank's own values count, so they must be equal: seed all ranks alike "
            "before building the model, or use memory_efficient_init=True, where global rank 0's values win."
        ),
    )


def _differing_names(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return "values differ in " + ", ".join(names[:5]) + more


@contextmanager
def _rebinding(records: tuple[DetachedOptimizer, ...], model: nn.Module) -> Iterator[None]:
    drop_references(records)
    try:
        yield
    finally:
        for record in records:
            record.rebind(model)


def _dtypes(model: nn.Module, options: WrapOptions, optimizers: Sequence[Optimizer]) -> dict[str, str | None]:
    parameters = list(model.parameters())
    stored = stored_dtypes(parameters)
    held = {dtype_name(p.dtype) for o in optimizers for g in o.param_groups for p in g["params"]}
    policy = options.policy
    return {
        "stored": stored,
        "compute": dtype_name(policy.param_dtype) if policy.param_dtype else stored,
        "reduce": dtype_name(policy.reduce_dtype) if policy.reduce_dtype else stored,
        "optimizer": " + ".join(sorted(held)) or None,
    }
