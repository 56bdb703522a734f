"""`shardwise export` of a saved training: what it needs is in the training's state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from shardwise.cli import app
from shardwise.compare import launch
from shardwise.transformers_model import resume
from shardwise.transformers_model.trained import lasting_name, peft_config_of

runner = CliRunner()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the ranks were started with."""
    asked: dict[str, Any] = {}

    def run_ranks(worker: Any, arguments: Any, **options: Any) -> dict[int, Any]:
        asked.update(json.loads(json.dumps(arguments)))
        return {0: {"summary": "done"}}

    monkeypatch.setattr(launch, "run_ranks", run_ranks)
    return asked


def saved(directory: Path, model: torch.nn.Module, *, name: str | None) -> str:
    directory.mkdir()
    mesh: Any = None
    training = resume.Training(model=model, optimizer=None, scheduler=None, scaler=None, mesh=mesh, name=name)
    resume._write_state(directory / resume.STATE_NAME, training, step=1, ranks=1)
    return str(directory)


def test_the_model_is_the_one_that_the_state_names(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    monkeypatch.chdir(tmp_path)
    state = saved(tmp_path / "state", torch.nn.Linear(1, 1), name=lasting_name("base"))
    assert runner.invoke(app, ["export", state, "out"]).exit_code == 0
    assert (asked["model"], asked["state"], asked["trained_adapters"]) == (str(base), state, {})
    assert runner.invoke(app, ["export", state, "out", "--model", "other"]).exit_code == 0
    assert asked["model"] == "other"
    for options, problem in (
        (["--merge"], "expected the training of an adapter with --merge"),
        (
            [],
            f"expected the model that was trained in {base}, as {state} says, got no directory. Give --model",
        ),
    ):
        if not options:
            base.rmdir()
        refused = runner.invoke(app, ["export", state, "out", *options])
        assert refused.exit_code == 2
        assert problem in refused.stderr


def test_a_new_model_has_no_name(asked: dict[str, Any], tmp_path: Path) -> None:
    state = saved(tmp_path / "state", torch.nn.Linear(1, 1), name=lasting_name(None))
    refused = runner.invoke(app, ["export", state, "out"])
    assert refused.exit_code == 2
    assert "expected --model with" in refused.stderr


def test_the_directory_of_a_training_is_no_checkpoint(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    for step in ("step-1", "step-2"):
        saved(tmp_path / "out" / "checkpoints" / step, torch.nn.Linear(1, 1), name=None)
    for source in (tmp_path / "out", tmp_path / "out" / "checkpoints"):
        refused = runner.invoke(app, ["export", str(source), "out"])
        assert refused.exit_code == 2
        assert (
            f"got {source} with 2 in it. Name one, such as {tmp_path}/out/checkpoints/step-2."
            in refused.stderr
        )
    assert not asked


def test_an_adapter_s_config_is_in_the_state(asked: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    given = peft.LoraConfig(r=3, target_modules=["0", "1"], lora_alpha=7, rank_pattern={"1": 2})
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    wrapped = peft.get_peft_model(model, given, "mine")
    given.base_model_name_or_path = "where/it/was"
    state = saved(tmp_path / "state", wrapped, name="a/hub-id")
    assert runner.invoke(app, ["export", state, "out", "--merge"]).exit_code == 0
    assert (asked["model"], asked["adapters"]) == ("a/hub-id", "merge")
    ((name, text),) = asked["trained_adapters"].items()
    assert name == "mine"
    found = peft_config_of(text)
    assert found.base_model_name_or_path is None  # PEFT warns of another name
    found.base_model_name_or_path = given.base_model_name_or_path
    assert found.to_dict() == given.to_dict()
