"""Plan a load for a job of any size in one process: headers or a config, no weights, no process group."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from shardwise.checkpoint import SafetensorsSource, Source, cached_snapshot, locate
from shardwise.conversion import pinned_dtypes
from shardwise.errors import CheckpointError, ConfigurationError
from shardwise.materialization import (
    Binding,
    CpuStorage,
    Entry,
    SourceCost,
    bind,
    check_bound,
    checked_cpu_storage,
    cost_of_source,
    default_staging_bytes,
    entries_of,
    kept_dtypes,
    resting_collector,
    wanted_of,
)
from shardwise.plan import ROUTES, Layout, Sight
from shardwise.planning.estimate import EstimatedSource, estimated_source
from shardwise.planning.load_plan import LoadPlan
from shardwise.planning.mesh_shape import MeshShape, axes_of
from shardwise.strategies.empty_model import build_empty
from shardwise.strategies.fsdp_config import FSDPConfig
from shardwise.strategies.placement import thrifty_dim
from shardwise.strategies.pretrained import await_values
from shardwise.strategies.wrapping import ignored_parameters
from shardwise.tensors import floating_dtype

DEVICES = ("cpu", "accelerator")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """What is planned: a model without values, and where these would come from."""

    name: str
    model: nn.Module
    source: Source
    binding: Binding


def plan_load(
    checkpoint_or_config: Any,
    *,
    mesh_shape: MeshShape,
    dtype: torch.dtype | str | None = None,
    route: str = "auto",
    model_cls: Any = None,
    device: str = "accelerator",
    ranks_per_node: int = 8,
    staging_bytes: int | None = None,
    cpu_storage: CpuStorage = "auto",
    revision: str | None = None,
) -> LoadPlan:
    """Say what `load_pretrained` and `wrap_model` of a strategy would cost, for any number of ranks.

    Nothing is read but headers, and no process group is needed. Every parameter is sharded on the dim that a strategy would choose, as
    `NativeFSDPStrategy` does it unless it is told otherwise; every rank is taken to see the files.

    Args:
        checkpoint_or_config: A directory, or the id of a model in a hub's local cache, whose headers are read; or a config of
            transformers, or a directory with nothing but its `config.json`. The stored tensors are then estimated.
        mesh_shape: Number of ranks that shard; (shards,); (replicas, shards); or sizes of axes by name, such as
            `{"dp_replicate": 2, "dp_shard": 4}`.
        dtype: In which parameters are kept; None and `"auto"` are the checkpoint's own.
        route: Who reads what, as `materialize` takes it.
        model_cls: A transformers model or auto class; None is the class that the config names, else a causal language
            model.
        device: Where shards are: `"cpu"` or `"accelerator"`.
        ranks_per_node: How many ranks share a node.
        staging_bytes: Bound of a rank's staging buffers, in bytes; None is 64 MiB on CPU ranks and 256 MiB on accelerators.
        cpu_storage: As `materialize` takes it; of accelerators nothing is mapped.
        revision: Of a hub id.

    Returns:
        The plan. From headers its bytes are those that a run reports; where more ranks than can be planned one by one hold
        shards of the same shapes, one of them stands for the others.

    Raises:
        CheckpointError: The checkpoint is damaged, is not on this machine, or does not fit the model.
        ConfigurationError: An argument is unknown or not possible.
        UnsupportedParameterError: FSDP2 cannot shard a parameter.
    """
    _check(route, device, ranks_per_node)
    stored = floating_dtype(dtype or "auto", others=("auto",))
    axes = axes_of(mesh_shape)
    on_host = device == "cpu"
    cpu_storage = checked_cpu_storage(cpu_storage, direct_io=False) if on_host else "copy"
    staging = staging_bytes or default_staging_bytes(device)
    with resting_collector():
        subject = _subject(checkpoint_or_config, dtype=stored, model_cls=model_cls, revision=revision)
        model, binding = subject.model, subject.binding
        entries = entries_of(model)
        layouts = _layouts(model, entries, tuple(axes.values()))
        dtype_of = kept_dtypes(entries, binding.bound, None)
        (wanted,) = wanted_of(
            model,
            entries,
            binding.bound,
            partial=frozenset(),
            layouts=layouts,
            device=torch.device("cpu"),  # what is mapped, and only of CPU ranks
            cpu_storage=cpu_storage,
            dtype_of=dtype_of,
        )
        ranks = next(iter(layouts.values())).mesh_ranks
        sight = Sight(
            ranks=ranks, nodes=tuple(f"node {rank // ranks_per_node}" for rank in ranks), readers=ranks
        )
        costs = cost_of_source(wanted, sight, route=route, staging_bytes=staging, on_host=on_host)
    return _plan_of(
        subject,
        costs,
        axes=axes,
        device=device,
        shard_bytes=_padded_bytes(entries, layouts, dtype_of, role="parameter"),
        buffer_bytes=_padded_bytes(
            [e for e in entries if e.fqn in binding.bound], layouts, dtype_of, role="buffer"
        ),
    )


def _check(route: str, device: str, ranks_per_node: int) -> None:
    if route not in ROUTES:
        raise ConfigurationError(f"route: expected one of {', '.join(ROUTES)}, got {route!r}")
    if device not in DEVICES:
        raise ConfigurationError(f"device: expected one of {', '.join(DEVICES)}, got {device!r}")
    if ranks_per_node < 1:
        raise ConfigurationError(f"ranks_per_node: expected at least 1, got {ranks_per_node}")


def _subject(subject: Any, *, dtype: Any, model_cls: Any, revision: str | None) -> _Subject:
    if isinstance(subject, (str, os.PathLike)):
        name = os.fspath(subject)
        path = _local_path(subject, revision)
        if path.is_file() or any(path.glob("*.safetensors")):
            source: Source = SafetensorsSource.open(path, name=name)
            directory = path if path.is_dir() else path.parent
            return _of_headers(name, directory, source, dtype=dtype, model_cls=model_cls)
        return _of_config(name, _config_in(path), dtype=dtype, model_cls=model_cls)
    if not hasattr(subject, "model_type"):
        raise ConfigurationError(
            f"plan_load: expected a directory, a hub id or a config of transformers, got {type(subject).__name__}."
        )
    return _of_config(type(subject).__name__, subject, dtype=dtype, model_cls=model_cls)


def _local_path(checkpoint: str | os.PathLike[str], revision: str | None) -> Path:
    location = locate(checkpoint, revision=revision)
    path = location.path if location.path is not None else cached_snapshot(location)
    if path is None:
        raise CheckpointError(
            f"{location.name}: expected a directory, or a model in the hub's local cache, got neither. Nothing is downloaded for a "
            "plan: download the model, or pass its config."
        )
    return path


def _config_in(path: Path) -> Any:
    from transformers import AutoConfig

    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: expected safetensors files or a config.json, got neither.")
    return AutoConfig.from_pretrained(path)


def _of_headers(name: str, directory: Path, source: Source, *, dtype: Any, model_cls: Any) -> _Subject:
    chosen_cls = model_cls or _class_of(_config_in(directory))
    model, chosen = build_empty(chosen_cls, name, directory, source, dtype=dtype)
    return _bound(name, model, source, chosen)


def _of_config(name: str, config: Any, *, dtype: Any, model_cls: Any) -> _Subject:
    with TemporaryDirectory(prefix="shardwise-") as nowhere:  # a config has no files beside it
        nothing = EstimatedSource(name, {})
        model, chosen = build_empty(
            model_cls or _class_of(config), name, Path(nowhere), nothing, dtype=dtype, config=config
        )
    await_values(
        model,
        entries_of(model),
        bind(model, entries_of(model), nothing, rename=None, conversions=None),
        chosen,
    )
    return _bound(name, model, estimated_source(model, name=name), chosen)


def _bound(name: str, model: nn.Module, source: Source, chosen: torch.dtype) -> _Subject:
    entries = entries_of(model)
    pinned = pinned_dtypes(model, chosen, stored=True)
    binding = bind(model, entries, source, rename=None, conversions=None, pinned=pinned)
    if not binding.bound:
        raise CheckpointError(
            f"{name}: expected tensors of {type(model).__name__}, got none that it takes. Pass model_cls=."
        )
    check_bound(entries, binding.bound)
    await_values(model, entries, binding, chosen)
    return _Subject(name=name, model=model, source=source, binding=binding)


def _class_of(config: Any) -> Any:
    import transformers

    for architecture in getattr(config, "architectures", None) or ():
        found = getattr(transformers, architecture, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM


def _layouts(model: nn.Module, entries: tuple[Entry, ...], sizes: tuple[int, ...]) -> dict[str, Layout]:
    ignored = {id(parameter) for parameter in ignored_parameters(entries, FSDPConfig())}
    ranks = 1
    for size in sizes:
        ranks *= size
    members = tuple(range(ranks))
    copies = (Replicate(),) * (len(sizes) - 1)
    whole = Layout.replicated(members)
    on_dim: dict[int, Layout] = {}  # a model has few layouts and many parameters
    layouts = {}
    for entry in entries:
        if entry.role != "parameter" or id(entry.tensor) in ignored:
            layouts[entry.fqn] = whole
            continue
        dim = thrifty_dim(tuple(entry.tensor.shape), sizes[-1])
        if dim not in on_dim:
            on_dim[dim] = Layout(mesh_shape=sizes, mesh_ranks=members, placements=(*copies, Shard(dim)))
        layouts[entry.fqn] = on_dim[dim]
    return layouts


def _padded_bytes(
    entries: list[Entry] | tuple[Entry, ...],
    layouts: Mapping[str, Layout],
    dtype_of: Mapping[str, torch.dtype],
    *,
    role: str,
) -> int:
    """Return the bytes of tensors on one rank; FSDP2 pads every shard to the size of the first one."""
    total = 0
    for entry in entries:
        if entry.role == role:
            layout = layouts[entry.fqn]
            shape = layout.local_shape(tuple(entry.tensor.shape), layout.mesh_ranks[0])
            total += torch.Size(shape or ()).numel() * dtype_of[entry.fqn].itemsize
    return total


def _plan_of(
    subject: _Subject,
    costs: SourceCost,
    *,
    axes: Mapping[str, int],
    device: str,
    shard_bytes: int,
    buffer_bytes: int,
) -> LoadPlan:
    cost = costs.cost
    stored = {stored.name: stored for bound in subject.binding.bound.values() for stored in bound.stored}
    kept = shard_bytes + buffer_bytes
    reads = int(cost.reads.sum())
    on_host = device == "cpu"
    host = cost.staging_bytes + (kept - cost.mapped_bytes if on_host else 0)
    return LoadPlan(
        model=subject.name,
        mesh=axes,
        device=device,
        estimated=isinstance(subject.source, EstimatedSource),
        route=costs.route.name,
        route_reason=costs.route.reason,
        planned_ranks=costs.planned_ranks,
        tensors=len(stored),
        stored_bytes=sum(each.nbytes for each in stored.values()),
        initialised=len(subject.binding.absent),
        storage_bytes=int(cost.storage_bytes.sum()),
        network_bytes=int(cost.network_bytes.sum()),
        reads=reads,
        mean_read_bytes=int(cost.read_bytes.sum()) // reads if reads else 0,
        rank_storage_bytes=int(cost.storage_bytes.max()),
        rank_network_bytes=int(cost.network_bytes.max()),
        rank_reads=int(cost.reads.max()),
        shard_bytes=shard_bytes,
        host_peak_bytes=int(host.max()),
        device_peak_bytes=0 if on_host else kept + int(cost.device_staging_bytes.max()),
    )
