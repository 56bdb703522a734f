"""Plan a job: a load on every route, the plain ways, the training after it, and whether it fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from shardwise.errors import ConfigurationError
from shardwise.materialization import CpuStorage
from shardwise.plan import ROUTES, check_route
from shardwise.planning.job_plan import JobPlan, Way, need_of, way_of_plain, way_of_route
from shardwise.planning.load_plan import LoadPlan
from shardwise.planning.mesh_shape import TENSOR_AXIS, MeshShape, axes_of, shard_ranks_of
from shardwise.planning.optimizer_states import OptimizerStates, optimizer_named
from shardwise.planning.outlook import Outlook, Setting, load_plan_of, outlook_of
from shardwise.planning.parameters import PlannedUnit, in_order_of_use
from shardwise.planning.plain_ways import Job, accelerate_stock, every_rank_loads, rank0_broadcasts
from shardwise.planning.planner import setting_of
from shardwise.planning.rates import Rates, measured_read_rate
from shardwise.planning.subject import Subject, subject_of
from shardwise.planning.training_state import TrainingState, training_state
from shardwise.planning.verdict import Alternative, Limits, Need, verdict
from shardwise.strategies.mesh import REPLICATE_AXES, SHARD_AXES
from shardwise.strategies.precision import check_mixed_precision, policy_of
from shardwise.tensors import floating_dtype


def plan_job(
    checkpoint_or_config: Any,
    *,
    mesh_shape: MeshShape,
    dtype: torch.dtype | str | None = None,
    mixed_precision: str = "bf16",
    optimizer: str = "adamw",
    route: str = "auto",
    routes: Sequence[str] | None = None,
    model_cls: Any = None,
    device: str = "accelerator",
    offload: bool = False,
    ranks_per_node: int = 8,
    staging_bytes: int | None = None,
    cpu_storage: CpuStorage = "auto",
    revision: str | None = None,
    read_bytes_per_second: float | None = None,
    link_bytes_per_second: float | None = None,
    measure_read: bool = False,
    host_bytes: int | None = None,
    device_bytes: int | None = None,
) -> JobPlan:
    """Say what bringing a model up would cost on each route and in the plain ways, and what training it takes.

    Args:
        checkpoint_or_config: As `plan_load` takes it.
        mesh_shape: As `plan_load` takes it.
        dtype: In which parameters are kept.
        mixed_precision: In which the model computes: `"bf16"`, `"fp16"` or `"no"`, as a strategy takes it.
        optimizer: One of `OPTIMIZERS`.
        route: That is taken; `"auto"` is the one that a strategy chooses.
        routes: To compare it with; None is all that make a difference here.
        model_cls: As `plan_load` takes it.
        device: As `plan_load` takes it.
        offload: As `plan_load` takes it.
        ranks_per_node: How many ranks share a node.
        staging_bytes: As `plan_load` takes it.
        cpu_storage: As `plan_load` takes it.
        revision: Of a hub id.
        read_bytes_per_second: From storage to one node.
        link_bytes_per_second: That one rank receives, or sends.
        measure_read: Whether the first is measured, on the checkpoint's files.
        host_bytes: Memory of a node.
        device_bytes: Memory of a device.

    Raises:
        CheckpointError: As `plan_load`; or there are no files to measure on.
        ConfigurationError: An argument is unknown or not possible.
        UnsupportedParameterError: FSDP2 cannot shard a parameter.
    """
    check_route(route)
    if mixed_precision == "fp8":
        raise ConfigurationError(
            "mixed_precision: expected 'bf16', 'fp16' or 'no', got 'fp8', whose layers are not planned."
        )
    check_mixed_precision(mixed_precision, device_type="cpu" if device == "cpu" else "accelerator")
    states = optimizer_named(optimizer)
    if measure_read and read_bytes_per_second is not None:
        raise ConfigurationError("expected a read rate, or that it be measured, got both.")
    setting = setting_of(
        mesh_shape,
        device=device,
        ranks_per_node=ranks_per_node,
        staging_bytes=staging_bytes,
        cpu_storage=cpu_storage,
        offload=offload,
    )
    limits = Limits(host_bytes=host_bytes, device_bytes=device_bytes)
    if device == "cpu" and device_bytes is not None:
        raise ConfigurationError("expected accelerator ranks for a limit on device memory, got device='cpu'.")
    stored = floating_dtype(dtype or "auto", others=("auto",))
    subject = subject_of(checkpoint_or_config, dtype=stored, model_cls=model_cls, revision=revision)
    if measure_read:
        files = sorted(subject.directory.glob("*.safetensors")) if subject.directory is not None else []
        read_bytes_per_second = measured_read_rate(files)
    rates = Rates(read_bytes_per_second=read_bytes_per_second, link_bytes_per_second=link_bytes_per_second)
    outlook = outlook_of(subject, setting)
    taken = load_plan_of(outlook, route=route)
    plans = [taken] if len(outlook.sight.ranks) == 1 else _on_routes(outlook, taken, routes)
    here = min(setting.ranks_per_node, setting.ranks)
    state = _state_of(outlook, states, mixed_precision)
    ways = [
        way_of_route(
            plan,
            chosen=plan is taken,
            training=state,
            ranks_per_node=here,
            rates=rates,
            limits=limits,
        )
        for plan in plans
    ]
    ways += _plain_ways(
        outlook, states, mixed_precision, state, ranks_per_node=here, rates=rates, limits=limits
    )
    found = None
    if limits.given:
        need = _need(taken, state, here)
        host_lacks = any(lack.where != "device" for lack in limits.lacking(need))
        changes = _alternatives(subject, setting, states, mixed_precision, route, host_lacks=host_lacks)
        found = verdict(need, limits, changes)
    return JobPlan(
        load=taken,
        ways=tuple(ways),
        training=state,
        ranks_per_node=here,
        rates=rates,
        limits=limits,
        verdict=found,
    )


def _on_routes(outlook: Outlook, taken: LoadPlan, routes: Sequence[str] | None) -> list[LoadPlan]:
    """Return the plans of all routes; what another one comes to as well is left out."""
    has_copies = any(tensor.layout.copies > 1 for tensor in outlook.wanted.pieces)
    several = len(outlook.sight.ranks_of_node) > 1
    wanted = routes
    if wanted is None:
        wanted = [name for name in ROUTES if name != "auto"]
        if not has_copies:
            wanted = [name for name in wanted if name != "replicate"]
        if not several:  # one node: its one reader is the job's
            wanted = [name for name in wanted if name != "node"]
    plans = {
        name: taken if name == taken.route else load_plan_of(outlook, route=name)
        for name in dict.fromkeys(wanted)
    }
    if taken.route not in plans:
        plans = {taken.route: taken, **plans}
    return list(plans.values())


def _plain_ways(
    outlook: Outlook,
    states: OptimizerStates,
    mixed_precision: str,
    state: TrainingState,
    *,
    ranks_per_node: int,
    rates: Rates,
    limits: Limits,
) -> Iterator[Way]:
    setting = outlook.setting
    job = Job(
        ranks=setting.ranks,
        ranks_per_node=ranks_per_node,
        nodes=len(outlook.sight.ranks_of_node),
        on_host=setting.on_host,
        offload=setting.offload,
        stored_bytes=outlook.stored_bytes,
        buffer_bytes=outlook.buffer_bytes,
    )
    upcasts = mixed_precision != "no"
    masters = _upcast(outlook.units) if upcasts else outlook.units
    of_accelerate = _state_of(dataclasses.replace(outlook, units=masters), states, mixed_precision)
    costs = [(every_rank_loads(outlook.units, job), state), (rank0_broadcasts(outlook.units, job), state)]
    if TENSOR_AXIS not in setting.axes:
        costs.append((accelerate_stock(outlook.units, job, upcasts=upcasts), of_accelerate))
    for cost, training in costs:
        yield way_of_plain(cost, training=training, ranks_per_node=ranks_per_node, rates=rates, limits=limits)


def _upcast(units: Sequence[PlannedUnit]) -> tuple[PlannedUnit, ...]:
    return tuple(
        dataclasses.replace(
            unit,
            parameters=tuple(
                dataclasses.replace(p, dtype=torch.float32) if p.trainable else p for p in unit.parameters
            ),
        )
        for unit in units
    )


def _state_of(outlook: Outlook, states: OptimizerStates, mixed_precision: str) -> TrainingState:
    policy = policy_of(mixed_precision)
    setting = outlook.setting
    return training_state(
        in_order_of_use(outlook.subject.model, outlook.units),
        shard_ranks=shard_ranks_of(setting.axes),
        optimizer=states,
        compute_dtype=policy.param_dtype,
        reduce_dtype=policy.reduce_dtype,
        buffer_bytes=outlook.buffer_bytes,
        on_host=setting.on_host,
        offload=setting.offload,
    )


def _need(plan: LoadPlan, state: TrainingState, ranks_per_node: int) -> Need:
    return need_of(
        node_host_bytes=plan.node_host_peak_bytes,
        device_bytes=plan.device_peak_bytes,
        training=state,
        ranks_per_node=ranks_per_node,
    )


def _alternatives(
    subject: Subject,
    setting: Setting,
    states: OptimizerStates,
    mixed_precision: str,
    route: str,
    *,
    host_lacks: bool,
) -> Iterator[Alternative]:
    """Yield what may help, the least change of a job first.

    Where a node's memory is what lacks, shards are not moved there, and more ranks come with nodes of their own.
    """
    axes = setting.axes
    replicas = next((size for name, size in axes.items() if name in REPLICATE_AXES), 1)
    changes: list[tuple[str, Setting]] = []
    shard = next((name for name in axes if name in SHARD_AXES), next(iter(axes)))
    if replicas > 1:
        fewer = {name: size for name, size in axes.items() if name not in REPLICATE_AXES}
        fewer[shard] *= replicas
        changes.append(("--replicas 1", dataclasses.replace(setting, axes=axes_of(fewer))))
    if not (setting.on_host or setting.offload or host_lacks):
        changes.append(("--offload", dataclasses.replace(setting, offload=True)))
    twice = {**axes, shard: axes[shard] * 2}
    per_node = min(setting.ranks_per_node, setting.ranks) if host_lacks else setting.ranks_per_node
    nodes = -(-2 * setting.ranks // per_node)
    changes.append(
        (
            f"--ranks {2 * setting.ranks} --nodes {nodes}",
            dataclasses.replace(setting, axes=axes_of(twice), ranks_per_node=per_node),
        )
    )
    for text, changed in changes:

        def needed(changed: Setting = changed) -> Need:
            outlook = outlook_of(subject, changed)
            state = _state_of(outlook, states, mixed_precision)
            here = min(changed.ranks_per_node, changed.ranks)
            return _need(load_plan_of(outlook, route=route), state, here)

        yield text, needed
