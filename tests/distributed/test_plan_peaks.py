"""Peaks of host memory that depend on what the process has freed before: of a training step, and where every rank loads.

Their ranks are new processes. glibc gives the large blocks of such a process back when they are freed; in one that has trained and loaded
before, it keeps them, in holes that others do not fit, and the same step takes up to twice the memory.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import shardwise as sw
from shardwise.compare.generated import generate_checkpoint
from shardwise.planning import plan_job, predicted_for
from shardwise.planning.optimizer_states import optimizer_named
from shardwise.planning.parameters import PlannedParameter, PlannedUnit
from shardwise.planning.training_state import TrainingState, training_state
from shardwise.testing import RankPool
from tests.distributed.models import write_checkpoint
from tests.distributed.test_plan_load import bring_up

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc for anonymous memory"),
]

MEBIBYTE = 2**20
WIDTH, HEAD_ROWS, LAYERS = 1536, 4608, 3  # 9 MiB a layer in float32, and 27
M_MMAP_THRESHOLD = -3  # of malloc.h


@pytest.fixture(scope="module")
def new_ranks() -> Iterator[RankPool]:
    with RankPool(2) as started:
        yield started


def give_large_blocks_back() -> None:
    """Keep glibc from learning to do otherwise, as it does from the first large block that is freed."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 2**10)


# --- training ---


def peak_of_a_step(compute: torch.dtype | None, reduce: torch.dtype | None) -> int:
    """Return by how much anonymous memory has grown at most in a third step, whose gradients are added to those of the others."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)
    give_large_blocks_back()
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
            gc.collect()  # FSDP2 leaves cycles, which a process with many objects finds late
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
    new_ranks: RankPool, ranks: int, compute: torch.dtype | None, reduce: torch.dtype | None
) -> None:
    state = planned(ranks, compute, reduce)
    for peak_bytes in new_ranks.run(peak_of_a_step, compute, reduce, ranks=ranks):
        in_mebibytes = (n / MEBIBYTE for n in (peak_bytes, state.host_bytes, state.sharded_bytes))
        print(ranks, compute, *(f"{each:.1f}" for each in in_mebibytes))
        assert abs(peak_bytes - state.host_bytes) <= 0.1 * state.host_bytes


# --- every rank loads ---


@pytest.fixture(scope="module")
def model_of_400_mib(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("eager") / "model"
    generate_checkpoint(
        directory, config_kind="dense", parameters=200_000_000, dtype=torch.bfloat16, seed=0, files=2
    )
    return str(directory)


def bring_up_anew(directory: str, dtype: torch.dtype | None) -> int:
    give_large_blocks_back()
    return bring_up(directory, (dist.get_world_size(),), "native-eager", dtype)["host_peak_bytes"]


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["mapped", "cast"])
def test_every_rank_loads_within_a_tenth_of_the_plan(
    new_ranks: RankPool, model_of_400_mib: str, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    # A first load imports modules, which would count here.
    new_ranks.run(bring_up_anew, str(write_checkpoint("qwen3_tied", tmp_path / "small")), dtype, ranks=2)
    plan = plan_job(model_of_400_mib, mesh_shape=2, dtype=dtype, mixed_precision="no", device="cpu")
    predicted = predicted_for(plan, "native-eager").host_peak_bytes
    measured = max(new_ranks.run(bring_up_anew, model_of_400_mib, dtype, ranks=2))
    print(
        dtype,
        f"{predicted / MEBIBYTE:.1f}",
        f"{measured / MEBIBYTE:.1f}",
        f"{plan.load.shard_bytes / MEBIBYTE:.1f}",
    )
    assert abs(predicted - measured) <= 0.1 * measured
