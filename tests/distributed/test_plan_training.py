"""What training takes is what a plan says: shards, gradients, optimizer, and what FSDP2 gathers, measured while a step runs."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import shardwise as sw
from shardwise.planning.optimizer_states import optimizer_named
from shardwise.planning.parameters import PlannedParameter, PlannedUnit
from shardwise.planning.training_state import TrainingState, training_state
from shardwise.testing import RankPool
from tests.distributed.heap import large_blocks_given_back

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc for anonymous memory"),
]

MEBIBYTE = 2**20
WIDTH, HEAD_ROWS, LAYERS = 1536, 4608, 3  # 9 MiB a layer in float32, and 27


def peak_of_a_step(compute: torch.dtype | None, reduce: torch.dtype | None) -> int:
    """Return by how much anonymous memory has grown at most in a third step, whose gradients are added to those of the others."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)
    with large_blocks_given_back():
        train(mesh, policy, width=8, head_rows=8)  # imports what a step imports
        gc.collect()
        return train(mesh, policy, width=WIDTH, head_rows=HEAD_ROWS)


def train(mesh: DeviceMesh, policy: MixedPrecisionPolicy, *, width: int, head_rows: int) -> int:
    batch = torch.zeros(1, width)  # its activations are nothing
    with sw.profile_memory(interval_seconds=0.002) as profile:
        layers = [nn.Linear(width, width, bias=False) for _ in range(LAYERS)]
        head = nn.Linear(width, head_rows, bias=False)
        model = nn.Sequential(*layers, head)
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters())
        for name in ("first", "second", "third"):
            with profile.phase(name):
                model(batch).sum().backward()
                optimizer.step()
    third = next(span for span in profile.phases if span.name == "third")
    return profile.peak_between(third.start_seconds, third.stop_seconds).anon_peak_bytes


def planned(ranks: int, compute: torch.dtype | None, reduce: torch.dtype | None) -> TrainingState:
    def unit(name: str, rows: int, *, keep_gathered: bool) -> PlannedUnit:
        parameter = PlannedParameter(
            fqn=name,
            dtype=torch.float32,
            trainable=True,
            sharded=True,
            full_numel=rows * WIDTH,
            shard_numel=rows * WIDTH // ranks,
            stored_as_kept=True,
        )
        return PlannedUnit(parameters=(parameter,), is_root=False, keep_gathered=keep_gathered)

    units = [unit(str(n), WIDTH, keep_gathered=False) for n in range(LAYERS)]
    return training_state(
        [*units, unit("head", HEAD_ROWS, keep_gathered=True)],
        shard_ranks=ranks,
        optimizer=optimizer_named("adamw"),
        compute_dtype=compute,
        reduce_dtype=reduce,
        buffer_bytes=0,
        on_host=True,
        offload=False,
    )


@pytest.mark.parametrize(
    ("ranks", "compute", "reduce"),
    [(1, None, None), (2, torch.bfloat16, torch.float32)],
    ids=["1, float32", "2, mixed"],
)
def test_a_step_peaks_where_the_plan_says(
    pool: RankPool, ranks: int, compute: torch.dtype | None, reduce: torch.dtype | None
) -> None:
    state = planned(ranks, compute, reduce)
    for peak_bytes in pool.run(peak_of_a_step, compute, reduce, ranks=ranks):
        in_mebibytes = (n / MEBIBYTE for n in (peak_bytes, state.host_bytes, state.sharded_bytes))
        print(ranks, compute, *(f"{each:.1f}" for each in in_mebibytes))
        assert abs(peak_bytes - state.host_bytes) <= 0.1 * state.host_bytes
