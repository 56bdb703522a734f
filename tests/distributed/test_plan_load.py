"""A plan from headers says what a run reports, on every route and mesh."""

from __future__ import annotations

import ctypes
import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import shardwise as sw
from shardwise.compare.modes import DEFAULT_MODES, MODES
from shardwise.planning import plan_job, predicted_for
from shardwise.testing import RankPool
from tests.distributed.models import transformers_fuses_experts, write_checkpoint

pytestmark = pytest.mark.distributed

KINDS = ("qwen3_tied", "qwen3_moe", "gpt2", "qwen3_large")
MODE_KINDS = ("qwen3_untied", "qwen3_tied", "qwen3_moe")
ROUTES = ("direct", "replicate", "node", "rank0", "striped", "auto")
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each kind."""
    root = tmp_path_factory.mktemp("plans")
    return {kind: write_checkpoint(kind, root / kind) for kind in {*KINDS, *MODE_KINDS}}


def load(
    directory: str, shape: tuple[int, ...], route: str, dtype: torch.dtype | None, cpu_storage: Any
) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    names = ("dp_replicate", "dp_shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    strategy = sw.NativeFSDPStrategy(mesh, mixed_precision="no", route=route, cpu_storage=cpu_storage)
    model = strategy.load_pretrained(AutoModelForCausalLM, directory, dtype=dtype or "auto")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed must not serve this one unseen
    strategy.wrap_model(model)
    assert strategy.last_report is not None
    return strategy.last_report.to_json()


def load_on_every_route(directory: str, shape: tuple[int, ...], cpu_storage: Any) -> list[dict[str, Any]]:
    return [load(directory, shape, route, None, cpu_storage) for route in ROUTES]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4,), (2, 2), (3,)], ids=str)
@pytest.mark.parametrize("cpu_storage", ["copy", "auto"])
def test_bytes_are_those_of_a_run(
    pool: RankPool, checkpoints: dict[str, Path], kind: str, shape: tuple[int, ...], cpu_storage: Any
) -> None:
    directory = str(checkpoints[kind])
    reports = pool.run(load_on_every_route, directory, shape, cpu_storage, ranks=math.prod(shape))[0]
    for route, report in zip(ROUTES, reports, strict=True):
        plan = sw.plan_load(
            directory,
            mesh_shape=shape,
            route=route,
            device="cpu",
            ranks_per_node=math.prod(shape),
            cpu_storage=cpu_storage,
        )
        got = (report["route"], report["route_reason"], report["storage_bytes"], report["network_bytes"])
        assert (plan.route, plan.route_reason, plan.storage_bytes, plan.network_bytes) == got, route
        by_rank = report["ranks"]
        assert plan.rank_storage_bytes == max(rank["storage_bytes"] for rank in by_rank)
        assert plan.rank_network_bytes == max(rank["network_bytes"] for rank in by_rank)
        if cpu_storage == "copy":
            assert plan.shard_bytes == max(rank["shard_bytes"] for rank in by_rank)


@pytest.mark.skipif(not transformers_fuses_experts(), reason="transformers 4.57 declares no conversions")
def test_bytes_of_conversions_of_whole_tensors(
    pool: RankPool, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = str(checkpoints["qwen3_moe"])
    for route in ("direct", "rank0", "striped"):
        report = pool.run(load_refusing_traces, directory, route, ranks=4)[0]
        with monkeypatch.context() as patch:
            patch.setattr("shardwise.conversion.recipes._traced", refusing)
            plan = sw.plan_load(
                directory, mesh_shape=4, route=route, device="cpu", ranks_per_node=4, cpu_storage="copy"
            )
        got = report["storage_bytes"], report["network_bytes"]
        assert (plan.storage_bytes, plan.network_bytes) == got, route


def refusing(group: Any, stored: Any) -> Any:
    from shardwise.conversion.tracing import NotTraceableError

    raise NotTraceableError("as if it were arithmetic")


def load_refusing_traces(directory: str, route: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardwise.conversion.recipes._traced", refusing)
        return load(directory, (4,), route, None, "copy")


# --- modes, as `shardwise compare` measures them; larger models: test_plan_peaks.py, benchmarks/bench_predicted.py ---


def bring_up(directory: str, shape: tuple[int, ...], mode: str, dtype: torch.dtype | None) -> dict[str, int]:
    """Return what this rank's report says of one mode: bytes requested by all, and the growth of its memory over load and wrap."""
    from transformers import AutoModelForCausalLM

    chosen = MODES[mode]
    names = ("dp_replicate", "dp_shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    make = sw.NativeFSDPStrategy if chosen.strategy == "native_fsdp" else sw.AccelerateStrategy
    strategy = make(
        mesh,
        mixed_precision="no",
        memory_efficient_init=chosen.memory_efficient_init,
        route=chosen.route,
    )
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with sw.profile_memory() as profile:
        model = strategy.load_pretrained(AutoModelForCausalLM, directory, dtype=dtype or "auto")
        strategy.wrap_model(model)
    assert strategy.last_report is not None
    return {"storage_bytes": strategy.last_report.storage_bytes, "host_peak_bytes": profile.anon_peak_bytes}


def bring_up_in(directory: str, shape: tuple[int, ...], modes: list[str]) -> list[dict[str, int]]:
    return [bring_up(directory, shape, mode, None) for mode in modes]


@pytest.mark.parametrize("kind", MODE_KINDS)
@pytest.mark.parametrize("shape", [(1,), (4,), (2, 2)], ids=str)
def test_every_mode_requests_what_is_predicted(
    pool: RankPool, checkpoints: dict[str, Path], kind: str, shape: tuple[int, ...]
) -> None:
    # Through Accelerate it is shardwise that fills all the same: of its routes one stands for all.
    others = (
        {name for name in MODES if name.startswith("accelerate-")} - set(DEFAULT_MODES) - {"accelerate-rank0"}
    )
    directory, modes, ranks = (
        str(checkpoints[kind]),
        [name for name, each in MODES.items() if each.strategy != "peer" and name not in others],
        math.prod(shape),
    )
    plan = plan_job(directory, mesh_shape=shape, mixed_precision="no", device="cpu", ranks_per_node=ranks)
    of_rank0 = pool.run(bring_up_in, directory, shape, modes, ranks=ranks)[0]
    for mode, measured in zip(modes, of_rank0, strict=True):
        predicted = predicted_for(plan, mode)
        assert predicted.storage_bytes == measured["storage_bytes"], mode
        assert abs(predicted.host_peak_bytes - measured["host_peak_bytes"]) <= 64 * MEBIBYTE, mode


@pytest.fixture(scope="module")
def model_of_450_mib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint large enough for its shards to stand out."""
    from shardwise.compare.generated import generate_checkpoint

    directory = tmp_path_factory.mktemp("large") / "model"
    generate_checkpoint(
        directory, config_kind="dense", parameters=230_000_000, dtype=torch.bfloat16, seed=0, files=2
    )
    return directory


def load_after_a_small_one(
    small: str, directory: str, shape: tuple[int, ...], route: str, dtype: torch.dtype | None
) -> dict[str, Any]:
    load(small, shape, route, dtype, "copy")  # imports modules, which would count
    return load(directory, shape, route, dtype, "copy")


@pytest.mark.parametrize(
    ("shape", "route", "dtype"),
    [
        ((1,), "direct", None),
        ((4,), "direct", torch.float32),
        ((2,), "rank0", torch.float32),
        ((2,), "striped", None),
        ((2, 2), "replicate", None),
        ((2, 2), "replicate", torch.float32),
        ((2, 2), "node", None),
    ],
    ids=str,
)
def test_the_host_peak_is_within_a_tenth_of_the_measured_one(
    pool: RankPool,
    checkpoints: dict[str, Path],
    model_of_450_mib: Path,
    shape: tuple[int, ...],
    route: str,
    dtype: torch.dtype | None,
) -> None:
    directory = str(model_of_450_mib)
    ranks = math.prod(shape)
    plan = sw.plan_load(
        directory,
        mesh_shape=shape,
        route=route,
        dtype=dtype,
        device="cpu",
        ranks_per_node=ranks,
        cpu_storage="copy",
    )
    small = str(checkpoints["qwen3_tied"])
    report = pool.run(load_after_a_small_one, small, directory, shape, route, dtype, ranks=ranks)[0]
    measured = max(rank["host_anon_peak_bytes"] for rank in report["ranks"])
    assert abs(plan.host_peak_bytes - measured) <= 0.1 * measured
