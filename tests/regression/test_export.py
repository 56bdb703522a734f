"""Export's promises: a kill leaves a whole directory or none, and a rank's memory grows by staging alone."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.layouts import mesh_of

MIB = 2**20
KILLS = 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has threads")
def test_a_kill_at_any_moment_leaves_a_whole_directory_or_none(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_export.py")
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(KILLS)], capture_output=True, text=True, timeout=280
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert len(result["found"]) == KILLS + 2
    assert result["found"][-1] == "0.5"
    assert {"0.5", "1.0"} <= set(result["found"])
    assert result["left"] == ["out"]


ROWS, COLUMNS, LAYERS = 8 * 1024, 2048, 4  # 64 MiB each in float32


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc for anonymous memory")
@pytest.mark.parametrize("way", ["rows", "columns", "cast", "sent to one rank"])
def test_memory_grows_by_staging_alone(pool: RankPool, tmp_path: Path, way: str) -> None:
    pool.run(export_small, str(tmp_path / "small"), ranks=2)  # imports modules, which would count
    for peak in pool.run(export_large, str(tmp_path / "out"), way, ranks=2):
        assert peak <= 64 * MIB + 64 * MIB
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for layer in range(LAYERS):
            stored = file.get_slice(f"{layer}.weight")
            assert (stored[:] == layer + 1).all()


def stack_of(rows: int, columns: int) -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(columns, rows, bias=False) for _ in range(LAYERS)))


def export_small(target: str) -> None:
    model = stack_of(4, 4).to_empty(device="cpu")
    fully_shard(model, mesh=mesh_of(dp_shard=2))
    sw.export_checkpoint(model, target)


def export_large(target: str, way: str) -> int:
    from unittest import mock

    from shardwise.export.directory import OutputDirectory

    model = stack_of(ROWS, COLUMNS)
    dim = 1 if way == "columns" else 0
    fully_shard(model, mesh=mesh_of(dp_shard=2), shard_placement_fn=lambda _: Shard(dim))
    model.to_empty(device="cpu")
    for layer, parameter in enumerate(model.parameters()):
        nn.init.constant_(parameter.to_local(), layer + 1)
    options: dict[str, Any] = {"dtype": torch.bfloat16} if way == "cast" else {}
    sees = dist.get_rank() == 0 or way != "sent to one rank"
    ctypes.CDLL(None).malloc_trim(0)
    with mock.patch.object(OutputDirectory, "is_seen", return_value=sees):
        report = sw.export_checkpoint(model, target, **options)
    own: int = report.ranks[dist.get_rank()].host_anon_peak_bytes
    assert report.written_bytes == LAYERS * ROWS * COLUMNS * (2 if way == "cast" else 4)
    return own
