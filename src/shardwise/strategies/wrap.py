"""The one wrap that both strategies use: check, shard, fill, rebind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.materialization import (
    Agreement,
    Structure,
    collect_report,
    device_of,
    entries_of,
    local_bytes_of,
    origins_of,
    resting_collector,
    stored_dtypes,
)
from shardwise.profiling import LoadReport, phase, profile_memory
from shardwise.strategies.deferred import Deferred
from shardwise.strategies.equal_models import sampled_values, structure_of_units
from shardwise.strategies.filling import fill_whole, shard_and_fill
from shardwise.strategies.mesh import ranks_of, source_rank_of
from shardwise.strategies.optimizers import DetachedOptimizer, check_optimizers, drop_references
from shardwise.strategies.placement import placement_lines, refuse_reshard
from shardwise.strategies.sharding import shard_units
from shardwise.strategies.wrap_options import WrapOptions
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


def wrap(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    options: WrapOptions,
    *,
    name: str,
    origins: Mapping[str, str],
    deferred: Deferred,
    refuse: Callable[[], None],
    prepare: Callable[[], None],
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
        prepare: What the strategy does with the model and what was made on it, when that is rebound.
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
    with agreement.whole_call(), profile_memory(device=device, proportional=False) as profile:
        with agreement.phase("check") as check, resting_collector():
            refuse_wrapped(model)
            refuse()
            records, units, structure = _check(model, optimizers, options, checkpointing=shard is None)
            check.same = structure_of_units(structure, units, options)
        records = records if shard is None else ()
        with _rebound_if_it_fails(records, model):
            drop_references(records)
            if options.efficient:
                cost = shard_and_fill(model, units, options, deferred, agreement, device)
            else:
                cost = fill_whole(model, options, deferred, agreement)
                _shard_values(model, agreement, shard or (lambda: shard_units(model, units, options)))
        with agreement.phase("finish"):
            for record in records:
                record.rebind(model)
            prepare()
            own = json.dumps(origins) if agreement.rank == source_rank_of(options.mesh) else None
            known: dict[str, str] = json.loads(agreement.publish("origins", own))
    with agreement.phase("report"), resting_collector():
        entries = entries_of(model, roles=("parameter", "buffer"))
        parameters = [entry.tensor for entry in entries if entry.role == "parameter"]
        return collect_report(
            model,
            agreement,
            profile,
            name=name,
            strategy=options.strategy,
            route=cost.route,
            route_reason=cost.reason,
            shard_bytes=local_bytes_of(parameters),
            storage_bytes=cost.storage_bytes,
            network_bytes=cost.network_bytes,
            retried_reads=cost.retried_reads,
            predicted=cost.predicted,
            origins=origins_of(entries, known | cost.origins),
            converted=cost.converted,
            dtypes=_dtypes(parameters, options, optimizers),
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
    lines = (*Structure.of(entries).lines, *placement_lines(entries, ignored, options.config))
    return records, units, Structure(lines=lines)


def _shard_values(model: nn.Module, agreement: Agreement, shard: Callable[[], None]) -> None:
    with agreement.phase("compare values") as compare:
        compare.same = sampled_values(entries_of(model))
    with agreement.phase("shard"), phase("fully_shard"):
        shard()


@contextmanager
def _rebound_if_it_fails(records: tuple[DetachedOptimizer, ...], model: nn.Module) -> Iterator[None]:
    """Leave no optimizer empty behind a wrap that failed; that one's error is what counts."""
    try:
        yield
    except BaseException:
        for record in records:
            with suppress(Exception):
                record.rebind(model)
        raise


def _dtypes(
    parameters: Sequence[torch.Tensor], options: WrapOptions, optimizers: Sequence[Optimizer]
) -> dict[str, str | None]:
    stored = stored_dtypes(parameters)
    held = {dtype_name(p.dtype) for o in optimizers for g in o.param_groups for p in g["params"]}
    policy = options.policy
    return {
        "stored": stored,
        "compute": dtype_name(policy.param_dtype) if policy.param_dtype else stored,
        "reduce": dtype_name(policy.reduce_dtype) if policy.reduce_dtype else stored,
        "optimizer": " + ".join(sorted(held)) or None,
    }
