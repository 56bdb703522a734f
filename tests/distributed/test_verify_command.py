"""`shardwise verify` from the command line: what it says, and the status that it leaves with."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from shardwise.cli import app
from tests.distributed.steps import Checkpoint

runner = CliRunner()


@pytest.fixture(autouse=True)
def _collect_launchers() -> Iterator[None]:
    """Let go of each launcher here: torch's keep-alive timer fails when its own thread is the one that collects it."""
    yield
    gc.collect()


def test_equal_is_status_0(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, report = checkpoint("qwen3_untied"), tmp_path / "report.json"
    done = runner.invoke(app, ["verify", model, "--ranks", "1", "--json", str(report)])
    assert done.exit_code == 0, done.output
    tensors = len(load_file(Path(model) / "model.safetensors"))
    assert f"{tensors} tensors compared, equal" in done.stdout
    found = json.loads(report.read_text())
    assert found["is_equal"]
    assert (found["tensors"], found["mismatches"], found["absent"]) == (tensors, [], [])


def test_a_flipped_byte_on_disk_is_named_and_status_1(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, copy, report = checkpoint("qwen3_untied"), tmp_path / "copy", tmp_path / "report.json"
    shutil.copytree(model, copy)
    name = "model.layers.1.mlp.up_proj.weight"
    flip(copy / "model.safetensors", name, row=30)
    done = runner.invoke(
        app, ["verify", model, "--against", str(copy), "--ranks", "2", "--json", str(report)]
    )
    assert done.exit_code == 1, done.output
    # 40 rows on two ranks: row 30 is row 10 of the second.
    line = f"{name} (rank 1): 1 element differs from {name} in model.safetensors, the first at (10, 0) of the shard"
    assert line in done.stdout
    assert "1 shard differs" in done.stdout
    (mismatch,) = json.loads(report.read_text())["mismatches"]
    assert (mismatch["fqn"], mismatch["rank"], mismatch["first_index"]) == (name, 1, [10, 0])


def flip(file: Path, name: str, *, row: int) -> None:
    """Flip one bit of the first element of a row, as it lies in the file."""
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    columns = header[name]["shape"][1]
    content[start + header[name]["data_offsets"][0] + row * columns * 2] ^= 1  # bf16
    file.write_bytes(content)


def test_a_tensor_that_the_other_checkpoint_lacks_is_status_1(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = checkpoint("qwen3_untied")
    tensors = load_file(Path(model) / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    done = runner.invoke(app, ["verify", model, "--against", str(tmp_path), "--ranks", "1"])
    assert done.exit_code == 1, done.output
    assert "not in the checkpoint: lm_head.weight\n" in done.stdout


def test_a_checkpoint_that_cannot_be_compared_is_status_1_with_the_reason(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = checkpoint("qwen3_untied")
    values = load_file(Path(model) / "model.safetensors")
    values["model.norm.weight"] = torch.zeros(7, dtype=torch.bfloat16)
    save_file(values, tmp_path / "model.safetensors")
    done = runner.invoke(app, ["verify", model, "--against", str(tmp_path), "--ranks", "1"])
    assert done.exit_code == 1
    assert "model.norm.weight: expected (32,) bfloat16 from the model, got (7,)" in done.stderr


def test_the_statuses_are_documented() -> None:
    text = " ".join(runner.invoke(app, ["verify", "--help"]).stdout.split())
    statuses = "0 if all are equal, 1 if a shard differs, OTHER lacks a tensor, or the comparison failed, 2 for wrong"
    assert f"Leaves with status {statuses}" in text
