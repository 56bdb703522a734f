"""What a rank holds while a model is trained: parameters, gradients, optimizer, and what FSDP2 gathers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shardwise.planning.optimizer_states import OptimizerStates
from shardwise.planning.parameters import PlannedParameter, PlannedUnit
from shardwise.planning.step_memory import UnitBytes, most_gathered_bytes
from shardwise.tensors import dtype_name


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Bytes of the rank that holds the most. Activations, and what the batch needs beside them, are not among them.

    Args:
        optimizer: Its name.
        parameters: Bytes of the shards, by dtype, with FSDP2's padding.
        gradients: Bytes of the sharded gradients, by dtype.
        optimizer_states: Bytes of what the optimizer keeps, by dtype.
        buffer_bytes: Of the model's buffers.
        gathered_bytes: Most of gathered parameters, whole gradients and their buffers at a time, in forward and backward.
        step_bytes: Most that the optimizer makes at a step and frees again.
        in_host_memory: Whether the shards are in host memory: CPU ranks, or offloaded.
        gathers_in_host_memory: Whether the forward is: CPU ranks.
        pinned_bytes: What pinning adds to shards and gradients.
    """

    optimizer: str
    parameters: Mapping[str, int]
    gradients: Mapping[str, int]
    optimizer_states: Mapping[str, int]
    buffer_bytes: int
    gathered_bytes: int
    step_bytes: int
    in_host_memory: bool
    gathers_in_host_memory: bool
    pinned_bytes: int

    @property
    def sharded_bytes(self) -> int:
        """Kept from step to step: parameters, gradients and the optimizer's."""
        kinds = (self.parameters, self.gradients, self.optimizer_states)
        return sum(sum(of_kind.values()) for of_kind in kinds) + self.pinned_bytes

    @property
    def host_bytes(self) -> int:
        """Most in the host memory of a rank."""
        return self._most(in_host_memory=True)

    @property
    def device_bytes(self) -> int:
        """Most in the memory of a rank's device."""
        return self._most(in_host_memory=False)

    def _most(self, *, in_host_memory: bool) -> int:
        shards_here = self.in_host_memory == in_host_memory
        gathers_here = self.gathers_in_host_memory == in_host_memory
        gathered = self.gathered_bytes if gathers_here else 0
        kept = self.buffer_bytes if gathers_here else 0
        if not shards_here:
            return kept + gathered
        return kept + self.sharded_bytes + max(gathered, self.step_bytes)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data, with its sums."""
        kinds = ("parameters", "gradients", "optimizer_states")
        document = {**asdict(self), **{kind: dict(getattr(self, kind)) for kind in kinds}}
        return {
            **document,
            "sharded_bytes": self.sharded_bytes,
            "host_bytes": self.host_bytes,
            "device_bytes": self.device_bytes,
        }


def training_state(
    units: Sequence[PlannedUnit],
    *,
    shard_ranks: int,
    optimizer: OptimizerStates,
    compute_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    buffer_bytes: int,
    on_host: bool,
    offload: bool,
) -> TrainingState:
    """Work out what a rank holds while a model is trained; gradients are counted throughout, as while batches are accumulated.

    Source: torch 2.13. `foreach_reduce` (`torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py`) leaves gradients in the dtype of the
    shards, as views of one padded buffer of each unit. Offloaded shards and gradients are pinned, parameter by parameter, by an allocator
    that rounds up to powers of two (`c10::llvm::PowerOf2Ceil` in `aten/src/ATen/core/CachingHostAllocator.h`); what the optimizer
    keeps of them is not.

    Args:
        units: In the order of a forward.
        shard_ranks: Ranks over which parameters are sharded.
        optimizer: What it keeps.
        compute_dtype: Of gathered parameters; None is the stored one.
        reduce_dtype: Of gradients on their way; None is the compute dtype.
        buffer_bytes: Of the model's buffers.
        on_host: Whether ranks are CPU ranks.
        offload: Whether shards are kept in host memory, where ranks are not.
    """
    parameters = [parameter for unit in units for parameter in unit.parameters]
    trained = [p for p in parameters if p.trainable] if optimizer.name != "none" else []
    offloaded = offload and not on_host
    pinned = 0
    if offloaded:
        pinned = sum(_pinned_more(p) for p in parameters) + sum(_pinned_more(p) for p in trained)
    if on_host or offload:
        step = optimizer.largest_tensors * max((p.shard_bytes for p in trained), default=0)
    else:
        step = optimizer.foreach_tensors * sum(p.shard_bytes for p in trained)
    computed = [
        _unit_bytes(unit, shard_ranks, compute_dtype, reduce_dtype, trains=bool(trained)) for unit in units
    ]
    return TrainingState(
        optimizer=optimizer.name,
        parameters=_by_dtype(parameters, 1),
        gradients=_by_dtype(trained, 1),
        optimizer_states=_by_dtype(trained, optimizer.tensors),
        buffer_bytes=buffer_bytes,
        gathered_bytes=most_gathered_bytes(computed, shard_ranks=shard_ranks, copies_to_reduce=on_host),
        step_bytes=step,
        in_host_memory=on_host or offload,
        gathers_in_host_memory=on_host,
        pinned_bytes=pinned,
    )


def pinned_bytes_of(nbytes: int) -> int:
    """Return what torch's allocator of pinned memory takes for a tensor of so many bytes."""
    return 1 << (nbytes - 1).bit_length() if nbytes > 0 else 0


def _pinned_more(parameter: PlannedParameter) -> int:
    return pinned_bytes_of(parameter.shard_bytes) - parameter.shard_bytes


def _by_dtype(parameters: Iterable[PlannedParameter], times: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for parameter in parameters:
        if times:
            name = dtype_name(parameter.dtype)
            found[name] = found.get(name, 0) + times * parameter.shard_bytes
    return found


def _unit_bytes(
    unit: PlannedUnit,
    shard_ranks: int,
    compute_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    *,
    trains: bool,
) -> UnitBytes:
    gathered = gradients = reduced = 0
    for parameter in unit.parameters:
        if not parameter.sharded:
            continue
        dtype = compute_dtype if compute_dtype is not None else parameter.dtype
        numel = parameter.shard_numel * shard_ranks
        gathered += numel * dtype.itemsize
        if parameter.trainable and trains:
            gradients += numel * dtype.itemsize
            reduced += numel * (reduce_dtype or dtype).itemsize
    return UnitBytes(
        gathered_bytes=gathered,
        gradient_bytes=gradients,
        reduced_bytes=reduced,
        keep_gathered=unit.keep_gathered,
    )
