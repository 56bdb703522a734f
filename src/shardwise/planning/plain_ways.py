"""What the usual ways to start cost: formulas, each with where it comes from.

A is what a plain `from_pretrained` copies instead of mapping, A' the same in the dtype that Accelerate trains in; M is the model in
the dtype that is kept, S a rank's shard, T the largest tensor, N the ranks, L those of a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.planning.cost import Cost
from shardwise.planning.parameters import PlannedParameter, PlannedUnit
from shardwise.planning.training_state import pinned_bytes_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Where a model is brought up.

    Args:
        ranks: In the job.
        ranks_per_node: On the fullest node.
        nodes: In the job.
        on_host: Whether ranks are CPU ranks.
        offload: Whether shards are kept in host memory, where ranks are not.
        stored_bytes: Of the checkpoint that the model takes.
        buffer_bytes: Of the model's buffers, on each rank.
    """

    ranks: int
    ranks_per_node: int
    nodes: int
    on_host: bool
    offload: bool
    stored_bytes: int
    buffer_bytes: int

    @property
    def receivers_of_node(self) -> int:
        """Ranks of a node that rank 0 sends to: on its own node one less."""
        return self.ranks_per_node if self.nodes > 1 else self.ranks_per_node - 1


EVERY_RANK = "every rank loads"
BROADCAST = "rank 0 broadcasts"
ACCELERATE = "Accelerate, stock"


def every_rank_loads(units: Sequence[PlannedUnit], job: Job) -> Cost:
    """`from_pretrained` on every rank, then `fully_shard` unit by unit.

    Host: A on every rank, and where shards are in host memory these take its place as unit after unit is sharded; on CPU ranks of
    a bf16 model that is mapped that is S. Device: the shards so far, and a whole unit. Storage: M per node, requested by each rank.

    Source: `_materialize_copy` of `transformers.core_model_loading` (5.23) and `_load_state_dict_into_meta_model` (4.57.6) slice a mapped
    file, and copy where the dtype changes or a conversion makes new tensors. `_move_states_to_device` of torch's `_fsdp_init.py` (2.13) moves a whole unit
    to the device, and `FSDPParam._init_sharded_param` copies each shard into padded memory; the full tensors go when `fully_shard` returns.

    Args:
        units: In the order in which they are sharded.
        job: Where.
    """
    host = peak = sum(_copied_bytes(p) for unit in units for p in unit.parameters)
    device = device_peak = 0
    for unit in units:
        full = sum(p.full_bytes for p in unit.parameters)
        shards = sum(_kept_bytes(p, job) for p in unit.parameters)
        copied = sum(_copied_bytes(p) for p in unit.parameters)
        if job.on_host or job.offload:
            peak = max(peak, host + shards)
            host += shards - copied
            device_peak = max(device_peak, full + max((p.shard_bytes for p in unit.parameters), default=0))
        else:
            device_peak = max(device_peak, device + full + shards)
            device += shards
    return Cost(
        name=EVERY_RANK,
        host_peak_bytes=peak + (job.buffer_bytes if job.on_host else 0),
        node_host_peak_bytes=job.ranks_per_node * (peak + (job.buffer_bytes if job.on_host else 0)),
        device_peak_bytes=0 if job.on_host else device_peak + job.buffer_bytes,
        storage_bytes=job.nodes * job.stored_bytes,
        node_storage_bytes=job.stored_bytes,
        rank_storage_bytes=job.stored_bytes,
        network_bytes=0,
        node_network_bytes=0,
        rank_network_bytes=0,
    )


def rank0_broadcasts(units: Sequence[PlannedUnit], job: Job) -> Cost:
    """Rank 0 loads, and `set_model_state_dict(broadcast_from_rank0=True)` sends each tensor whole to every rank, which cuts it.

    Host: A on rank 0; on CPU ranks S more there and S + T elsewhere. Device: S + T. Storage: M. Network: M to each other rank.

    Source: `_broadcast_tensors` and `_distribute_tensors` of `torch/distributed/_state_dict_utils.py` (2.13): one key at a time,
    `full_state.detach().to(device)` on rank 0, `torch.empty(size)` elsewhere, a broadcast, and the rank's slice copied. Measured on CPU ranks
    of 1 B parameters in float32 (`benchmarks/results/rank0-float32.json`): A + S and 45 MiB on rank 0, S + T and 11 MiB elsewhere.

    Args:
        units: Of the model.
        job: Where.
    """
    parameters = [p for unit in units for p in unit.parameters]
    copied = sum(_copied_bytes(p) for p in parameters)
    shards = sum(_kept_bytes(p, job) for p in parameters) + job.buffer_bytes
    largest = max((p.full_bytes for p in parameters), default=0) if job.ranks > 1 else 0
    in_host_memory = shards if job.on_host or job.offload else 0
    on_rank0 = copied + in_host_memory
    elsewhere = in_host_memory + (largest if job.on_host else 0)
    moved = sum(p.full_bytes for p in parameters)
    if job.on_host:
        device = 0
    elif job.offload:
        device = (
            2 * largest + job.buffer_bytes
        )  # torch puts the whole tensor on the device, and moves the slice back
    else:
        device = shards + largest
    return Cost(
        name=BROADCAST,
        host_peak_bytes=max(on_rank0, elsewhere if job.ranks > 1 else 0),
        node_host_peak_bytes=max(
            on_rank0 + (job.ranks_per_node - 1) * elsewhere,
            job.ranks_per_node * elsewhere if job.nodes > 1 else 0,
        ),
        device_peak_bytes=device,
        storage_bytes=job.stored_bytes,
        node_storage_bytes=job.stored_bytes,
        rank_storage_bytes=job.stored_bytes,
        network_bytes=(job.ranks - 1) * moved,
        node_network_bytes=job.receivers_of_node * moved,
        rank_network_bytes=moved if job.ranks > 1 else 0,
    )


def accelerate_stock(units: Sequence[PlannedUnit], job: Job, *, upcasts: bool) -> Cost:
    """Accelerate's `cpu_ram_efficient_loading` as it is, beside transformers 5: every rank loads, and rank 0's values are sent.

    Host: A' on every rank, all of M' in float32 where mixed precision is on. Device: S' + T' and a shard of it, T' + T'/N. Storage: M
    per node. Network: M' to each rank, and a shard of it once more.

    Source: transformers 5.23 asks `is_fsdp_enabled()` for missing keys alone, so that every rank loads. `fsdp2_prepare_model` of
    `accelerate/utils/fsdp_utils.py` (1.15) makes each trainable parameter float32 in host memory, keeps `original_sd` on every rank and moves
    the model to meta; `fsdp2_load_full_state_dict` broadcasts each full tensor over the device, and `distribute_tensor` scatters it again
    (`Shard._shard_tensor`, whose pieces of an even tensor are views; those of an uneven one are padded copies, which makes it 2 to 3 T').
    On CPU ranks Accelerate replicates instead of sharding: there the figures are those of its functions, not of a run.

    Args:
        units: Of the model.
        job: Where.
        upcasts: Whether mixed precision is on.
    """
    parameters = [p for unit in units for p in unit.parameters]

    def itemsize(parameter: PlannedParameter) -> int:
        return 4 if upcasts and parameter.trainable else parameter.dtype.itemsize

    full = {p.fqn: p.full_numel * itemsize(p) for p in parameters}
    shards = sum(p.shard_numel * itemsize(p) for p in parameters) + job.buffer_bytes
    host = sum(full[p.fqn] if itemsize(p) != p.dtype.itemsize else _copied_bytes(p) for p in parameters)
    largest = max(parameters, key=lambda p: full[p.fqn], default=None)
    passing = full[largest.fqn] + largest.shard_numel * itemsize(largest) if largest is not None else 0
    if job.on_host or job.offload:
        host += shards
    if job.on_host:
        host += passing
    moved = sum(full.values())
    sent_again = sum(p.shard_numel * itemsize(p) for p in parameters if p.sharded)
    of_rank = moved + sent_again if job.ranks > 1 else 0
    device = 0 if job.on_host else passing + (job.buffer_bytes if job.offload else shards)
    return Cost(
        name=ACCELERATE,
        host_peak_bytes=host,
        node_host_peak_bytes=job.ranks_per_node * host,
        device_peak_bytes=device,
        storage_bytes=job.nodes * job.stored_bytes,
        node_storage_bytes=job.stored_bytes,
        rank_storage_bytes=job.stored_bytes,
        network_bytes=(job.ranks - 1) * of_rank,
        node_network_bytes=job.receivers_of_node * of_rank,
        rank_network_bytes=of_rank,
    )


def _copied_bytes(parameter: PlannedParameter) -> int:
    """Return what a plain load of a parameter takes of host memory that is not the file's."""
    return 0 if parameter.stored_as_kept else parameter.full_bytes


def _kept_bytes(parameter: PlannedParameter, job: Job) -> int:
    if job.offload and not job.on_host:
        return pinned_bytes_of(parameter.shard_bytes)
    return parameter.shard_bytes
