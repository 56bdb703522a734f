"""`benchmarks/gpu.py`: the order of its rows, rows that are left out with their reason, and a rehearsal on the CPU."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def run(gpu: ModuleType, path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = gpu.main([*arguments, "--json", str(path)])
    document: dict[str, Any] = json.loads(path.read_text())
    return status, document


def test_without_an_accelerator_nothing_is_measured(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    status, document = run(gpu, tmp_path / "out.json")
    assert status == 0
    assert document["device"] is None
    assert {row["status"] for row in document["rows"]} == {"not measured"}
    assert {row["reason"] for row in document["rows"]} == {"this machine has no accelerator"}
    names = [row["name"] for row in document["rows"]]
    assert len(names) == len(set(names))
    assert names[:4] == [  # what matters most comes first
        "floor: read into pinned memory",
        "floor: copy to the device",
        "load, warm: shardwise",
        "4 ranks, native-efficient",
    ]


def test_a_load_is_rehearsed_on_the_cpu(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever else the machine is doing: it may have little memory free, and be slow.
    measured = gpu._measured
    monkeypatch.setattr(
        gpu, "_measured", lambda *row, device, limit: measured(*row, device=device, limit=250.0)
    )
    monkeypatch.setattr(gpu, "_free_host_bytes", lambda: 2**40)
    arguments = ("--device", "cpu", "--parameters", "200000", "--repeats", "1", "--directory", str(tmp_path))
    status, document = run(gpu, tmp_path / "out.json", *arguments, "--only", "warm: shardwise")
    (row,) = document["rows"]
    assert row["status"] == "ok", row
    assert status == 0
    (once,) = row["runs"]
    stored = 0
    for path in (tmp_path / "model").glob("*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            stored += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    assert once["bytes"] == stored > 0
    assert once["phases"]["read"] <= once["seconds"] == row["seconds"]
    assert once["host_anon_peak_bytes"] > 0


def test_where_no_checkpoint_can_be_made_every_row_says_why(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(directory: Path, **_: Any) -> None:
        directory.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gpu.gpu_checkpoint, "write_checkpoint", broken)
    folder = tmp_path / "not" / "there"
    arguments = ("--device", "cpu", "--parameters", "200000", "--directory", str(folder))
    for _ in range(2):  # what was left by the first is not taken for a checkpoint by the second
        status, document = run(gpu, tmp_path / "out.json", *arguments)
        assert status == 1
        assert {row["status"] for row in document["rows"]} == {"failed"}
        assert {row["error"] for row in document["rows"]} == {
            "no checkpoint could be made: OSError: [Errno 28] No space left on device"
        }


def test_a_plan_that_breaks_leaves_the_row_to_show_it(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("anon")

    monkeypatch.setattr(gpu, "plan_job", broken)
    rows = {row.name: row for row in gpu.rows_of(ranks=4, repeats=1)}
    assert gpu._does_not_fit(rows["4 ranks, native-eager, float32"], tmp_path, device="cpu") is None


def test_the_checkpoint_has_the_shape_of_qwen3_8b(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = importlib.import_module("gpu_checkpoint")
    jobs: list[Any] = []
    monkeypatch.setattr(made, "_write", jobs.append)  # 16 GB
    monkeypatch.setattr(made, "_BLOCK_ELEMENTS", 2**28)
    monkeypatch.setattr(made, "_WRITE_BYTES", 2**40)
    monkeypatch.setattr(torch, "randn", lambda n, **_: torch.empty(n, device="meta"))
    total = made.write_checkpoint(tmp_path / "model", parameters=made.QWEN3_8B_PARAMETERS, files=4, threads=1)
    assert total == 2 * made.QWEN3_8B_PARAMETERS == 16_381_470_720
    assert sum(values.nbytes for _, _, values in jobs) == total
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 4


def test_a_row_that_takes_too_long_is_a_row_with_its_reason(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "rows.sh"
    program.write_text("echo still at it\nexec sleep 120\n")
    monkeypatch.setattr(gpu, "_ROWS", program)
    # On a busy machine Python takes seconds to start.
    monkeypatch.setattr(gpu.sys, "executable", "/bin/sh")
    row = gpu.Row(name="slow", limit_seconds=3, request={})
    entry = gpu._measured(row, tmp_path, device="cpu", limit=3.0)
    assert entry["status"] == "failed"
    assert entry["error"] == "it took longer than 3 s. still at it"
    assert entry["row_seconds"] < 60


def test_what_would_not_fit_is_left_out_by_the_plans_word(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.import_module("gpu_checkpoint").write_checkpoint(
        tmp_path / "model", parameters=200_000, files=1, threads=1
    )
    rows = {row.name: row for row in gpu.rows_of(ranks=4, repeats=1)}
    monkeypatch.setattr(gpu, "_free_host_bytes", lambda: 2**20)
    monkeypatch.setattr(gpu, "_SPARE_BYTES", 0)
    reason = gpu._does_not_fit(rows["4 ranks, native-eager, float32"], tmp_path / "model", device="cpu")
    assert reason is not None
    assert "GiB of host memory for 4 ranks, of which this machine has 0 free" in reason
    monkeypatch.setattr(gpu, "_free_host_bytes", lambda: 2**40)
    assert gpu._does_not_fit(rows["4 ranks, native-eager, float32"], tmp_path / "model", device="cpu") is None
    monkeypatch.setattr(gpu, "_free_host_bytes", lambda: 0)
    for name in ("4 ranks, dcp-reader", "load, warm: shardwise"):  # of these no plan is made
        assert gpu._does_not_fit(rows[name], tmp_path / "model", device="cpu") is None


def test_the_share_of_the_slower_floor(gpu: ModuleType) -> None:
    floors = [
        {
            "name": f"floor: {name}",
            "status": "ok",
            "request": {"kind": "floor"},
            "bytes": 100,
            "seconds": seconds,
        }
        for name, seconds in (("read", 2.0), ("copy", 1.0))
    ]
    runs = [{"bytes": 100, "phases": {"read": 4.0}}, {"bytes": 100, "phases": {"read": 2.5}}]
    load = {"name": "load, warm: shardwise", "status": "ok", "request": {"kind": "load"}, "runs": runs}
    assert gpu.share_of_floor([*floors, load]) == pytest.approx(0.8)
    assert gpu.share_of_floor([floors[0], load]) is None
    assert gpu.share_of_floor([*floors, {**load, "status": "failed"}]) is None
