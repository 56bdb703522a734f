"""`shardwise load` from the command line."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shardwise import LoadReport
from shardwise.cli import app
from tests.distributed.steps import Checkpoint

runner = CliRunner()


@pytest.fixture(autouse=True)
def _collect_launchers() -> Iterator[None]:
    """Let go of each launcher here: torch's keep-alive timer fails when its own thread is the one that collects it."""
    yield
    gc.collect()


def test_it_prints_and_writes_the_load_report(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    asked = ["--ranks", "2", "--strategy", "accelerate", "--route", "rank0", "--dtype", "float32"]
    done = runner.invoke(app, ["load", checkpoint("qwen3_untied"), *asked, "--json", str(path)])
    assert done.exit_code == 0, done.output
    report = LoadReport.from_json(json.loads(path.read_text()))
    assert str(report) in done.stdout
    assert (report.strategy, report.route, report.world_size) == ("accelerate", "rank0", 2)
    assert report.dtypes["stored"] == "float32"


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("--strategy", "ddp", "native_fsdp"), ("--route", "fast", "striped"), ("--dtype", "int8", "int8")],
)
def test_a_wrong_option_is_status_2_before_a_rank_starts(option: str, value: str, named: str) -> None:
    done = runner.invoke(app, ["load", "nowhere", option, value])
    assert done.exit_code == 2
    assert named in done.stderr
