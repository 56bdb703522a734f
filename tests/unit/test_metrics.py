"""Figures of each step on disk: whole lines, of one training, and in TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shardwise.training import metrics
from shardwise.training.metrics import Metrics


@pytest.fixture
def no_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("no_board")
def test_a_training_that_goes_on_keeps_the_lines_of_its_own_steps(tmp_path: Path) -> None:
    first = Metrics(tmp_path, steps=0)
    for step in (1, 2, 3, 4):
        first.add({"step": step, "loss": step / 2})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # a file system that was full
    again = Metrics(tmp_path, steps=2)
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]
    again.add({"step": 3, "loss": 9.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    Metrics(tmp_path, steps=0)
    assert lines(tmp_path) == []


def test_tensorboard_gets_the_figures_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, *, purge_step: int) -> None:
            told.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def close(self) -> None:
            told.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    found = importlib.util.find_spec("json")
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: found)
    board = Metrics(tmp_path, steps=4)
    board.add({"step": 5, "loss": 2.0, "grad_norm": None})
    board.close()
    assert told == [(str(tmp_path / "tensorboard"), 5), ("loss", 2.0, 5), "closed"]
