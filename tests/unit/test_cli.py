"""The command line: options, exit statuses, errors of one paragraph."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from shardwise.cli import app, demo, terminal
from shardwise.compare import demo_model, experiment, fine_tune, small_model
from shardwise.compare.experiment import Comparison
from shardwise.compare.fine_tune import FineTuning
from shardwise.errors import CheckpointError, CommandError, MissingDependencyError
from shardwise.report import agreement_lines
from tests.unit.comparisons import comparison as synthetic_comparison

runner = CliRunner()

OPTIONS = {
    "demo": {"--model", "--ranks", "--output-dir", "--json", "--debug"},
    "compare": {
        "--ranks",
        "--dtype",
        "--mode",
        "--routes",
        "--peers",
        "--replicas",
        "--repeats",
        "--load-only",
        "--output-dir",
        "--json",
        "--debug",
    },
    "report": {"--html", "--trace", "--png", "--debug"},
    "plan": {
        "--ranks",
        "--nodes",
        "--replicas",
        "--tp",
        "--mesh",
        "--dtype",
        "--mixed-precision",
        "--optimizer",
        "--offload",
        "--route",
        "--device",
        "--ranks-per-node",
        "--read-gbps",
        "--measure-read",
        "--link-gbps",
        "--host-ram",
        "--device-ram",
        "--json",
        "--debug",
    },
    "train": {
        "--output-dir",
        "--ranks",
        "--strategy",
        "--dtype",
        "--mixed-precision",
        "--steps",
        "--epochs",
        "--batch-size",
        "--gradient-accumulation",
        "--block-size",
        "--lr",
        "--weight-decay",
        "--warmup-steps",
        "--max-grad-norm",
        "--activation-checkpointing",
        "--reshard-after-forward",
        "--no-reshard-after-forward",
        "--lora-rank",
        "--lora-alpha",
        "--lora-dropout",
        "--lora-target",
        "--loss-on",
        "--seed",
        "--eval-fraction",
        "--eval-every",
        "--checkpoint-every",
        "--keep",
        "--async-checkpoints",
        "--resume",
        "--overwrite",
        "--export",
        "--no-export",
        "--export-dtype",
        "--json",
        "--debug",
    },
    "load": {
        "--ranks",
        "--strategy",
        "--dtype",
        "--mixed-precision",
        "--route",
        "--cpu-storage",
        "--json",
        "--debug",
    },
    "verify": {"--against", "--ranks", "--json", "--debug"},
    "export": {
        "--model",
        "--merge",
        "--dtype",
        "--max-shard-size",
        "--overwrite",
        "--trust-remote-code",
        "--ranks",
        "--json",
        "--debug",
    },
}


def comparison(*, equal: bool | None = True, status: str = "ok", answer: str | None = "Paris.") -> Comparison:
    run: dict[str, Any] = {"mode": "native-eager", "status": status, "answer": answer}
    if status != "ok":
        run = {"mode": "native-eager", "status": status, "error": "rank 1 of 2 failed first: MemoryError."}
    differences = [{"mode": "native-efficient", "tensors": [f"w{n}" for n in range(7)], "logits": True}]
    found = {
        "equal": equal,
        "reference": "native-eager",
        "parameters": 9,
        "buffers": 2,
        "differences": differences if equal is False else [],
    }
    return Comparison(document={"schema": experiment.SCHEMA, "model": "m", "runs": [run], "agreement": found})


class FakeCompare:
    """Stands for the experiment and the report: notes what was asked, and returns or raises what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, Any] = {}
        self.outcome: Comparison | Exception = comparison()
        monkeypatch.setattr(experiment, "compare", self.compare)
        monkeypatch.setattr("shardwise.report.render", lambda document, console: console.print("TABLE"))
        monkeypatch.setattr("shardwise.report.save_figure", lambda document, path: Path(path).touch())
        for name in ("save_page", "save_trace"):
            monkeypatch.setattr(f"shardwise.report.{name}", lambda documents, path: Path(path).touch())

    def compare(self, model: str, **arguments: Any) -> Comparison:
        self.asked = {"model": model, **arguments}
        arguments["progress"]("half-way")
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCompare:
    return FakeCompare(monkeypatch)


def test_the_options_of_each_command_are_these() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {
        name: {
            option
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
            if option.startswith("-")
        }
        for name, command in commands.items()
    }
    assert {name: options - {"--help"} for name, options in found.items()} == OPTIONS


@pytest.mark.parametrize("command", [[], ["demo"], ["compare"], ["train"], ["verify"], ["export"]])
def test_help(command: list[str]) -> None:
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_the_command_line_itself_needs_no_transformers() -> None:
    program = (
        "import sys, shardwise.cli; sys.exit('transformers' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=240, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "m", "--mode", "fast"], "mode: expected one of native-eager"),
        (["compare", "m", "--dtype", "int8"], "dtype: expected one of auto"),
        (["compare", "/nowhere/at/all"], "model: expected a directory or a hub id, got '/nowhere/at/all'"),
        (
            ["export", "m", "out", "--model", "m"],
            "export: expected a training's checkpoint with --model, got m without",
        ),
        (
            ["export", "m", "out", "--merge"],
            "export: expected a training's checkpoint with --merge, got m without",
        ),
        (["demo", "--model", "./nowhere"], "model: expected a directory or a hub id, got './nowhere'"),
    ],
)
def test_wrong_use_is_one_paragraph_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert f"shardwise: {message}" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["compare"], ["compare", "m", "--ranks", "0"], ["train-my-dog"]])
def test_options_that_cannot_be_read_are_status_2(arguments: list[str]) -> None:
    assert runner.invoke(app, arguments).exit_code == 2


def test_the_output_of_ranks_that_failed_is_where_the_error_says() -> None:
    with terminal.temporary_logs() as logs:
        pass
    assert not logs.exists()
    with pytest.raises(CommandError), terminal.temporary_logs() as logs:
        raise CommandError("failed")
    assert logs.is_dir()
    logs.rmdir()


@pytest.mark.parametrize("command", [["demo"], ["compare", "m"]])
def test_inside_a_launcher_it_is_refused(command: list[str]) -> None:
    result = runner.invoke(app, command, env={"RANK": "0", "WORLD_SIZE": "2"})
    assert result.exit_code == 2
    assert "without torchrun or accelerate launch" in result.stderr


def test_options_reach_the_experiment(fake: FakeCompare, tmp_path: Path) -> None:
    arguments = ["compare", "org/m", "--ranks", "3", "--dtype", "float32", "--repeats", "5"]
    arguments += ["--mode", "native-efficient", "--mode", "accelerate-eager"]
    arguments += ["--output-dir", str(tmp_path / "out"), "--json", str(tmp_path / "more" / "x.json")]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    asked = fake.asked
    assert (asked["model"], asked["ranks"], asked["dtype"], asked["repeats"]) == ("org/m", 3, "float32", 5)
    assert [mode.name for mode in asked["modes"]] == ["native-efficient", "accelerate-eager"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.html",
        "report.json",
        "report.png",
        "report.trace.json",
    ]
    assert json.loads((tmp_path / "more" / "x.json").read_text()) == comparison().document
    assert "half-way" in result.stderr  # progress is not in the way of what a pipe wants
    assert "half-way" not in result.stdout
    for text in (
        "TABLE",
        "9 parameters and 2 buffers, byte for byte",
        'answers: "Paris."',
        "report.png",
        "report.html",
        "report.trace.json",
        "x.json",
    ):
        assert text in result.stdout


def test_modes_that_differ_are_named_and_status_1(fake: FakeCompare, tmp_path: Path) -> None:
    fake.outcome = comparison(equal=False)
    result = runner.invoke(app, ["compare", "m", "--output-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert (
        "NOT EQUAL: native-efficient differs from native-eager in 7 of 9 parameters and 2 buffers "
        "(w0, w1, w2, w3, w4 and 2 more) and in the logits." in result.stdout
    )
    assert (tmp_path / "report.json").is_file()


def test_a_failed_mode_is_status_1_and_says_where_its_logs_are(fake: FakeCompare, tmp_path: Path) -> None:
    fake.outcome = comparison(equal=None, status="failed")
    result = runner.invoke(app, ["compare", "m", "--output-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "Values were not compared" in result.stdout
    assert f"Output of the failed ranks: {tmp_path / 'logs'}" in result.stdout


def test_without_matplotlib_it_says_how_to_install_it_and_succeeds(
    fake: FakeCompare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_figure(document: Any, path: Path) -> None:
        raise MissingDependencyError("matplotlib is not installed. Run `pip install 'shardwise[report]'`.")

    monkeypatch.setattr("shardwise.report.save_figure", save_figure)
    result = runner.invoke(app, ["compare", "m", "--output-dir", str(tmp_path)])
    assert result.exit_code == 0
    assert "No picture: matplotlib is not installed. Run `pip install 'shardwise[report]'`." in result.stdout


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Let packages look as if they were not installed."""
    monkeypatch.setattr(
        "shardwise.compare.requirements.find_spec", lambda name: None if name in packages else object()
    )


@pytest.mark.parametrize(
    ("packages", "text"),
    [
        (("accelerate",), "expected accelerate, which is not installed."),
        (("matplotlib",), "expected matplotlib, which is not installed."),
        (("accelerate", "matplotlib"), "expected accelerate and matplotlib, which are not installed."),
    ],
)
@pytest.mark.parametrize("options", [[], ["--model", "m"]])
def test_a_demo_without_its_extra_says_so_before_it_does_anything(
    fake: FakeCompare,
    monkeypatch: pytest.MonkeyPatch,
    packages: tuple[str, ...],
    text: str,
    options: list[str],
) -> None:
    without(monkeypatch, *packages)
    monkeypatch.setattr(demo_model, "demo_model", lambda progress: pytest.fail("the model was prepared"))
    result = runner.invoke(app, ["demo", *options])
    assert result.exit_code == 2
    assert result.stderr == (
        f"shardwise: shardwise demo: {text} Install what the demo needs with: pip install 'shardwise[demo]'\n"
    )
    assert fake.asked == {}


def test_modes_without_their_package_are_refused_before_any_is_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without(monkeypatch, "accelerate")
    monkeypatch.setattr(
        "shardwise.compare.experiment.model_directory",
        lambda *_, **__: pytest.fail("the model was looked for"),
    )
    result = runner.invoke(app, ["compare", "m", "--output-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "accelerate-eager, accelerate-efficient: expected accelerate, which is not" in result.stderr
    assert "pip install 'shardwise[accelerate]', or name other modes with --mode" in result.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CheckpointError("a.safetensors: cut short. Download it again."), 1),
        (CommandError("rank 2 failed."), 1),
        (MissingDependencyError("accelerate is not installed."), 2),
        (OSError(28, "No space left on device"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_are_told_once_and_tracebacks_on_demand(
    fake: FakeCompare, tmp_path: Path, error: Exception, status: int
) -> None:
    fake.outcome = error

    def compare(model: str, **arguments: Any) -> Comparison:
        raise error

    command = ["compare", "m", "--output-dir", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "compare", compare)
        brief, long = runner.invoke(app, command), runner.invoke(app, [*command, "--debug"])
    assert brief.exit_code == long.exit_code == status
    assert brief.stderr.strip().startswith("shardwise: ")
    assert len(brief.stderr.strip().splitlines()) == 1
    assert "Traceback" in long.stderr


TUNED: dict[str, Any] = {
    "ranks": 4,
    "losses": [4.0, 3.0],
    "plain_losses": [4.0, 3.0003],
    "answer": " Write it down.",
    "answers_alike": True,
    "export": "e",
    "seconds": 9.0,
    "plain_seconds": 5.0,
}


@pytest.mark.parametrize(
    ("changed", "status", "says"),
    [
        ({}, 0, "no step differs by more than 0.01 %"),
        ({"plain_losses": [4.0, 3.1]}, 1, "no step differs by more than 3.2 %"),
        ({"losses": [4.0, 4.0], "plain_losses": [4.0, 4.0]}, 1, "loss 4.0000, at the end 4.0000"),
        ({"answers_alike": False}, 1, 'with OTHER TOKENS as the sharded model: "Write it down."'),
    ],
)
def test_demo_fine_tunes_its_own_model(
    fake: FakeCompare,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changed: dict[str, Any],
    status: int,
    says: str,
) -> None:
    (tmp_path / "tokenizer.json").touch()
    monkeypatch.setattr(demo_model, "demo_model", lambda progress: tmp_path)
    tuned = FineTuning(**{**TUNED, **changed})
    monkeypatch.setattr(fine_tune, "fine_tune", lambda model, directory, *, ranks, progress: tuned)
    result = runner.invoke(app, ["demo", "--output-dir", str(tmp_path / "out")])
    assert result.exit_code == status
    assert says in result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["fine_tuning"]["losses"] == tuned.losses
    other = runner.invoke(app, ["demo", "--ranks", "3", "--output-dir", str(tmp_path / "out")])
    assert "No fine-tuning: a step has 4 rows, which 3 ranks cannot share equally" in other.stderr
    assert other.exit_code == 0


def test_demo_prepares_its_own_model(
    fake: FakeCompare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "demo_model", lambda progress: tmp_path / "smol")
    result = runner.invoke(app, ["demo", "--output-dir", str(tmp_path)])
    assert result.exit_code == 0
    assert result.stdout.endswith(
        f"Model: {tmp_path / 'smol'}\nTry: python -m shardwise verify {tmp_path / 'smol'} --ranks 4\n"
    )
    assert fake.asked["model"] == str(tmp_path / "smol")
    assert len(fake.asked["modes"]) == 4
    assert fake.asked["ranks"] == 4


def test_demo_says_so_and_goes_on_where_the_wheel_cannot_be_had(
    fake: FakeCompare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(progress: Any) -> Path:
        raise demo_model.ModelUnavailableError("no network. Check it.")

    monkeypatch.setattr(demo_model, "demo_model", unavailable)
    monkeypatch.setattr(small_model, "small_random_model", lambda progress: tmp_path / "random")
    result = runner.invoke(app, ["demo", "--output-dir", str(tmp_path)])
    assert result.exit_code == 0
    assert fake.asked["model"] == str(tmp_path / "random")
    assert "no network. Check it." in result.stderr
    assert "small random model instead" in result.stderr


def test_demo_does_not_hide_a_wrong_download(
    fake: FakeCompare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(progress: Any) -> Path:
        raise CheckpointError("expected sha256 a, got b.")

    monkeypatch.setattr(demo_model, "demo_model", damaged)
    result = runner.invoke(app, ["demo", "--output-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "expected sha256 a, got b." in result.stderr
    assert not fake.asked


def test_demo_with_a_model_prepares_none(
    fake: FakeCompare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_wanted(progress: Any) -> Path:
        pytest.fail("no model was to be prepared")

    monkeypatch.setattr(demo, "_own_model", not_wanted)
    assert runner.invoke(app, ["demo", "--model", "org/m", "--output-dir", str(tmp_path)]).exit_code == 0
    assert fake.asked["model"] == "org/m"


def test_demo_names_the_command_as_it_was_called(
    fake: FakeCompare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [".venv/bin/shardwise"])
    result = runner.invoke(
        app, ["demo", "--model", "my models/m", "--ranks", "2", "--output-dir", str(tmp_path)]
    )
    assert "Try: .venv/bin/shardwise verify 'my models/m' --ranks 2\n" in result.stdout


def test_agreement_in_words() -> None:
    assert agreement_lines(comparison().document) == [
        "All runs ended with equal parameters, buffers and logits (9 parameters and 2 buffers, byte for byte)."
    ]
    assert "fewer than two" in agreement_lines(comparison(equal=None).document)[0]


def test_progress_in_a_terminal_is_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with terminal.terminal_progress() as progress:
        progress("model [1 of 2]")  # not taken for markup


def test_report_makes_page_trace_and_picture_of_a_saved_comparison(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(synthetic_comparison()))
    out = {name: tmp_path / "out" / name for name in ("x.html", "x.trace.json", "x.png")}
    html, trace, png = map(str, out.values())
    result = runner.invoke(app, ["report", str(path), "--html", html, "--trace", trace, "--png", png])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Written: {html}, {trace}, {png}\n"
    assert all(file.stat().st_size > 1000 for file in out.values())
    assert not (tmp_path / "report.html").exists()


def test_report_alone_writes_the_page_beside_the_document(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(synthetic_comparison()))
    result = runner.invoke(app, ["report", str(path)])
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "expected a JSON document"), ("[]", "expected a JSON object"), ('{"schema": "x"}', "got ['x']")],
)
def test_report_of_something_else_is_one_paragraph_and_status_2(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    result = runner.invoke(app, ["report", str(path)])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["x.xyz", "x"])
def test_a_picture_of_another_kind_is_one_paragraph_and_status_2(name: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(synthetic_comparison()))
    result = runner.invoke(app, ["report", str(path), "--png", str(tmp_path / name)])
    assert result.exit_code == 2
    assert "expected a file that ends in .png, .svg or .pdf, got " in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_report_of_a_missing_file_is_status_1(tmp_path: Path) -> None:
    result = runner.invoke(app, ["report", str(tmp_path / "none.json")])
    assert result.exit_code == 1
    assert "none.json" in result.stderr
