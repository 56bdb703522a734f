"""`shardwise train`: options, what it shows, and how it says to go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shardwise.cli import app, train
from shardwise.cli.training_display import training_display
from shardwise.compare import launch
from shardwise.compare.train_worker import train_model
from shardwise.errors import ConfigurationError
from shardwise.training import LoraSettings, TrainSettings
from shardwise.transformers_model.sealed import RUN_NAME

runner = CliRunner()

STEP = {
    "kind": "step",
    "step": 2,
    "of": 30,
    "loss": 1.5,
    "tokens_per_second": 99.6,
    "peak_memory_bytes": 2**21,
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the ranks were started with; they return a good outcome."""
    asked: dict[str, Any] = {}

    def run_ranks(worker: Any, arguments: Any, **options: Any) -> dict[int, Any]:
        assert worker is train_model
        asked.update(options, settings=TrainSettings.from_json(json.loads(json.dumps(arguments["settings"]))))
        asked["go_on"] = arguments["go_on"]
        options["progress"](json.dumps({"kind": "note", "text": "half-way"}))
        options["progress"](json.dumps(STEP))
        options["progress"](json.dumps({"kind": "eval", "step": 2, "loss": 1.25}))
        outcome = {"stopped": False, "step": 30, "ranks": 2, "seconds": 1.0, "first_loss": 3.0, "loss": 1.0}
        return {0: {**outcome, "eval_loss": None, "checkpoint": None, "export": "out/export"}}

    monkeypatch.setattr(launch, "run_ranks", run_ranks)
    return asked


def test_what_is_asked_for_reaches_the_ranks(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.txt").touch()
    line = "train m d.txt --output-dir out --ranks 2 --lr 0.1 --batch-size 4 --json o.json --max-grad-norm 0"
    result = runner.invoke(app, line.split())
    assert result.exit_code == 0, result.output
    assert (asked["ranks"], asked["grace_seconds"]) == (2, 60)
    settings = asked["settings"]
    assert (settings.learning_rate, settings.batch_size, settings.dtype) == (0.1, 4, "float32")
    assert settings.max_grad_norm is None
    assert settings.lora is None
    assert "step 2 of 30: loss 1.5000, 100 tokens/s, peak 2 MiB" in result.stderr
    assert "step 2: eval loss 1.2500" in result.stderr
    assert "half-way" in result.stderr
    assert "loss 3.0000 at the first, 1.0000 at the last" in result.stdout
    assert "Written for from_pretrained: out/export" in result.stdout
    assert json.loads(Path("o.json").read_text())["step"] == 30


def test_an_adapter_leaves_the_base_in_its_own_dtype(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "d.txt").touch()
    line = [
        "train",
        "m",
        str(tmp_path / "d.txt"),
        "--output-dir",
        str(tmp_path),
        "--lora-rank",
        "4",
        "--lora-target",
        "q_proj",
    ]
    assert runner.invoke(app, line).exit_code == 0
    assert asked["settings"].dtype == "auto"
    assert asked["settings"].lora == LoraSettings(rank=4, alpha=16.0, dropout=0.0, targets=("q_proj",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--ranks 3",
            "batch_size: expected a multiple of 3 ranks x 1 passes (gradient_accumulation) = 3, got 8",
        ),
        ("--gradient-accumulation 16", "batch_size: expected a multiple of 1 ranks x 16 passes"),
        ("--strategy ddp", "strategy: expected one of accelerate, native_fsdp, got 'ddp'"),
        ("--dtype int8", "dtype: expected one of float32, bfloat16, auto, got 'int8'"),
        ("--mixed-precision fp4", "mixed_precision: expected one of no, bf16, fp16, got 'fp4'"),
        ("--export-dtype int8", "export_dtype: expected one of float32, bfloat16, got 'int8'"),
        ("--loss-on user", "loss_on: expected one of auto, all, assistant, got 'user'"),
        ("--lr 0", "learning_rate: expected a number above 0, got 0.0"),
        ("--lr nan", "learning_rate: expected a number above 0, got nan"),
        ("--eval-fraction 1", "eval_fraction: expected 0 or more and less than 1, got 1.0"),
        ("--eval-every 2", "eval_every: expected rows to evaluate with (eval_fraction), got 2 and none"),
        ("--seed -1", "seed: expected 0 or more and less than 2**63, got -1"),
        (
            "--lora-target q_proj",
            "--lora-alpha, --lora-dropout, --lora-target: expected --lora-rank with them",
        ),
        ("--lora-rank 2 --lora-dropout 1", "lora_dropout: expected 0 or more and less than 1, got 1.0"),
    ],
)
def test_wrong_options_are_refused_before_ranks_are_started(
    options: str, message: str, tmp_path: Path
) -> None:
    line = ["train", "m", "d.txt", "--output-dir", str(tmp_path / "out"), *options.split()]
    result = runner.invoke(app, line)
    assert result.exit_code == 2
    assert f"shardwise: {message}" in result.stderr
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_another_training_are_refused_before_ranks_are_started(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "d.txt").touch()
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    line = ["train", "m", str(tmp_path / "d.txt"), "--output-dir", str(tmp_path)]
    for options in ([], ["--overwrite"]):
        refused = runner.invoke(app, [*line, *options])
        assert refused.exit_code == 2
        assert (
            f"{tmp_path / 'checkpoints'}: expected no checkpoints, got step-00000002. Give --resume auto"
            in refused.stderr
        )
    assert not asked
    assert runner.invoke(app, [*line, "--resume", "auto"]).exit_code == 0


def test_an_interrupt_says_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.txt").touch()
    checkpoints, steps = tmp_path / "checkpoints", iter(("step-00000002", "step-00000004"))

    def run_ranks(worker: Any, arguments: Any, **options: Any) -> dict[int, Any]:
        (checkpoints / next(steps)).mkdir(parents=True)  # half-written
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "run_ranks", run_ranks)
    line = ["train", "m", str(tmp_path / "d.txt"), "--output-dir", str(tmp_path), "--resume", "auto"]
    monkeypatch.setattr("sys.argv", ["shardwise", *line])
    for told in (
        "No checkpoint was saved (--checkpoint-every saves some).",
        f"The newest checkpoint is {checkpoints / 'step-00000002'}. Go on with: shardwise {' '.join(line)}",
    ):
        interrupted = runner.invoke(app, line)
        assert interrupted.exit_code == 130
        assert f"shardwise: interrupted; nothing is left running. {told}\n" in interrupted.stderr
        (checkpoints / "step-00000002" / RUN_NAME).touch()


def test_the_command_that_goes_on_is_the_same_with_resume() -> None:
    assert (
        train._command_to_go_on(["/x/bin/shardwise", "train", "m", "a file", "--resume", "d", "--steps", "3"])
        == "/x/bin/shardwise train m 'a file' --steps 3 --resume auto"
    )
    assert (
        train._command_to_go_on(["/x/__main__.py", "train", "--resume=d"])
        == "python -m shardwise train --resume auto"
    )


@pytest.mark.parametrize("width", [200, 60])
def test_a_terminal_gets_a_bar_whose_figures_are_not_cut(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    figures = {"step": 200, "of": 3000, "tokens_per_second": 12345.6, "peak_memory_bytes": 2**34}
    with training_display() as show:
        show(json.dumps({"kind": "note", "text": "going on"}))
        show(json.dumps({**STEP, **figures}))
    said = capsys.readouterr().err
    assert "going on" in said
    assert "…" not in said
    for figure in ("200/3000", "1.5000", "12346", "16384"):
        assert figure in said
    if width == 200:
        assert "loss 1.5000, 12346 tokens/s, peak 16384 MiB" in said


def test_what_a_run_may_change_is_no_part_of_the_training(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "d.txt").touch()
    line = ["train", "m", str(tmp_path / "d.txt"), "--output-dir", str(tmp_path)]
    found = []
    for more in ([], ["--strategy", "accelerate", "--keep", "2", "--resume", "auto"], ["--lr", "0.5"]):
        assert runner.invoke(app, [*line, *more]).exit_code == 0
        found.append(asked["settings"].identity())
    assert found[0] == found[1]
    assert {name for name in found[0] if found[0][name] != found[2][name]} == {"learning_rate"}


def test_settings_are_checked_where_they_are_made() -> None:
    with pytest.raises(ConfigurationError, match="lora_rank: expected 1 or more, got 0"):
        LoraSettings(rank=0, alpha=1.0, dropout=0.0, targets=())
