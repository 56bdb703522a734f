"""What all commands have in common: `--json`, `--debug`, exit statuses, a line in the documentation, completion."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from rich.console import Console
from typer.testing import CliRunner

from shardwise import __version__, checkpoint, planning, report
from shardwise.checkpoint import Location
from shardwise.cli import app
from shardwise.compare import experiment, launch
from shardwise.compare.experiment import Comparison
from shardwise.errors import CheckpointError, CommandError, ConfigurationError
from tests.documents import page, rows, section
from tests.unit.comparisons import comparison

runner = CliRunner()

# Arguments with which each comes to its end, where ranks are replaced by what they return.
COMMANDS = {
    "demo": "--model m",
    "compare": "m",
    "report": "measured.json",
    "load": "m",
    "plan": "m --ranks 2",
    "train": "m text.txt --output-dir out",
    "verify": "m",
    "export": "m out",
}
NO_JSON = {"report"}  # it reads what the others write
RETURNED = {"summary": "done", "is_equal": True, "absent": [], "stopped": True}


class Work:
    """Stands for what commands do; it ends well, or raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: Exception | None = None
        found = {
            **comparison(),
            "agreement": {"equal": None, "parameters": 0, "buffers": 0, "differences": []},
        }
        plan: Any = type("Plan", (), {"verdict": None, "to_json": lambda self: {}})()
        monkeypatch.setattr(experiment, "compare", self.done(Comparison(document=found)))
        monkeypatch.setattr(launch, "run_ranks", self.done({0: dict(RETURNED)}))
        monkeypatch.setattr(planning, "plan_job", self.done(plan))
        monkeypatch.setattr("shardwise.cli.plan_display.show_plan", lambda plan: None)
        monkeypatch.setattr(checkpoint, "fetch_descriptions", lambda location: None)
        for name in ("save_page", "save_trace", "save_figure"):
            monkeypatch.setattr(report, name, self.done(None))

    def done(self, value: Any) -> Callable[..., Any]:
        def work(*arguments: Any, **options: Any) -> Any:
            if self.error is not None:
                raise self.error
            return value

        return work


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Work:
    monkeypatch.chdir(tmp_path)
    Path("measured.json").write_text(json.dumps(comparison()))
    Path("text.txt").touch()
    return Work(monkeypatch)


def test_these_are_all_commands() -> None:
    assert set(typer.main.get_command(app).commands) == set(COMMANDS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_success_is_status_0_and_the_result_is_written_as_json(command: str, work: Work) -> None:
    line = f"{command} {COMMANDS[command]}"
    if command not in NO_JSON:
        line += " --json new/result.json"
    done = runner.invoke(app, line.split())
    assert done.exit_code == 0, done.output
    if command not in NO_JSON:
        assert isinstance(json.loads(Path("new/result.json").read_text()), dict)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("error", "status"), [(CommandError("lost."), 1), (ConfigurationError("odd."), 2)])
def test_a_failure_is_one_paragraph_and_with_debug_the_traceback_too(
    command: str, error: Exception, status: int, work: Work
) -> None:
    work.error = error
    line = f"{command} {COMMANDS[command]}".split()
    failed = runner.invoke(app, line)
    assert failed.exit_code == status
    assert failed.stderr.splitlines()[-1] == f"shardwise: {error}"
    assert "Traceback" not in failed.stderr
    told = runner.invoke(app, [*line, "--debug"])
    assert told.exit_code == status
    assert "Traceback" in told.stderr


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - NO_JSON))
def test_results_are_written_before_anything_is_printed(
    command: str, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under `| head`, which closes the output when it has seen enough."""

    def closed(*words: Any, **options: Any) -> None:
        if options.get("file") is None:
            raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    monkeypatch.setattr(Console, "print", closed)
    monkeypatch.setattr("shardwise.cli.plan_display.show_plan", closed)
    monkeypatch.setattr("shardwise.cli.train._say", closed)
    monkeypatch.setattr(report, "save_page", lambda documents, path: path.touch())
    runner.invoke(app, [*command.split(), *COMMANDS[command].split(), "--json", "new/result.json"])
    assert isinstance(json.loads(Path("new/result.json").read_text()), dict)
    assert Path("report.html").exists() == (command in {"compare", "demo"})


@pytest.mark.parametrize("language", ["en", "zh"])
def test_each_has_a_row_in_the_documentation(language: str) -> None:
    described = rows(section(page("commands", language), "all"))
    assert set(described) >= set(COMMANDS)
    for command in COMMANDS:
        assert all(described[command]), command


@pytest.mark.parametrize(
    ("typed", "completed"), [("shardwise ve", "verify"), ("shardwise plan --off", "--offload")]
)
def test_a_shell_completes_commands_and_options(typed: str, completed: str) -> None:
    asked = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    answer = runner.invoke(
        app, [], prog_name="shardwise", env={"_SHARDWISE_COMPLETE": "complete_bash", **asked}
    )
    assert answer.output.split() == [completed]


def test_the_completion_of_a_shell_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "shellingham.detect_shell", lambda: ("bash", "/bin/bash")
    )  # whatever started the tests
    shown = runner.invoke(app, ["--show-completion"], prog_name="shardwise")
    assert shown.exit_code == 0
    assert re.search(r"complete .*shardwise", shown.output)


def test_version_names_what_it_stands_on_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "safetensors": "0.8.0"}

    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    said = runner.invoke(app, ["--version"])
    assert said.exit_code == 0
    assert said.output == (
        f"shardwise {__version__}, torch 2.13.0+cpu, transformers 5.23.0, accelerate (not installed), "
        "safetensors 0.8.0\n"
    )


@pytest.mark.parametrize(
    "line",
    ["load {}", "verify {}", "verify m --against {}", "export {} out", "train {} text.txt --output-dir out"],
)
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no/such/model", "a path that does not exist"),
        ("empty", "expected safetensors files, got none"),
        ("torch", "expected safetensors files, got only pickle files"),
    ],
)
def test_a_path_without_a_checkpoint_is_refused_before_ranks_are_started(
    line: str, name: str, problem: str, work: Work
) -> None:
    Path("empty").mkdir()
    Path("torch").mkdir()
    Path("torch/pytorch_model.bin").touch()
    work.error = AssertionError("ranks were started")
    refused = runner.invoke(app, line.format(name).split())
    # What is exported is mostly a path: one that is not there is a wrong argument.
    is_nothing = line.startswith("export") and not Path(name).exists()
    assert refused.exit_code == (2 if is_nothing else 1), refused.exception
    assert problem in refused.stderr
    assert not Path("out").exists()


WRONG_OPTIONS = {
    "load m --strategy fsdp": "strategy: expected one of accelerate, native_fsdp, got 'fsdp'",
    "load m --cpu-storage foo": "cpu_storage: expected one of auto, map, copy, got 'foo'",
    "load m --mixed-precision fp4": "mixed_precision: expected one of no, bf16, fp16, fp8, got 'fp4'.",
    "load m --mixed-precision fp8": "mixed_precision='fp8': NativeFSDPStrategy has no fp8 kernels",
    "load m --strategy accelerate --mixed-precision fp8": "mixed_precision='fp8': needs an accelerator",
    "load m --mixed-precision fp16": "mixed_precision='fp16': needs an accelerator",
    "train m text.txt --output-dir out --mixed-precision fp16": "mixed_precision='fp16': needs an accelerator",
    "export m out --dtype float33": "dtype: expected None or a floating point torch dtype or its name, got 'float33'",
    "export m out --max-shard-size lots": "max_shard_size: expected bytes as a number or a text such as '5GB' or '200MB', got 'lots'",
}


@pytest.mark.parametrize("line", WRONG_OPTIONS)
def test_a_wrong_option_is_status_2_before_ranks_are_started(
    line: str, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    work.error = AssertionError("ranks were started")
    refused = runner.invoke(app, line.split())
    assert refused.exit_code == 2, refused.exception
    assert f"shardwise: {WRONG_OPTIONS[line]}" in refused.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize(("accelerators", "status"), [(2, 0), (1, 2)])
def test_a_launchers_ranks_have_the_devices_that_it_started_them_for(
    accelerators: int, status: int, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not as many as the command would start itself; float16 needs an accelerator."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: accelerators)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    done = runner.invoke(app, ["load", "m", "--ranks", "4", "--mixed-precision", "fp16"])
    assert done.exit_code == status, done.output


@pytest.mark.parametrize("line", ["load m", "train m text.txt --output-dir out"])
def test_a_strategy_whose_library_is_not_installed_names_the_extra(
    line: str, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    work.error = AssertionError("ranks were started")
    refused = runner.invoke(app, [*line.split(), "--strategy", "accelerate"])
    assert refused.exit_code == 2, refused.exception
    assert "pip install 'shardwise[accelerate]'" in refused.stderr


def test_an_adapter_without_peft_names_the_extra(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *at: None if name == "peft" else found(name, *at)
    )
    work.error = AssertionError("ranks were started")
    refused = runner.invoke(app, ["train", "m", "text.txt", "--output-dir", "out", "--lora-rank", "4"])
    assert refused.exit_code == 2, refused.exception
    assert "--lora-rank needs peft. Install it with: pip install 'shardwise[peft]'" in refused.stderr


def test_a_name_of_nothing_is_not_exported(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(location: Location) -> None:
        raise CheckpointError(f"{location.name}: not on the hub.")

    monkeypatch.setattr(checkpoint, "fetch_descriptions", fetch)
    work.error = AssertionError("ranks were started")
    refused = runner.invoke(app, ["export", "NOTHING", "out"])
    assert refused.exit_code == 2, refused.exception
    told = "export: expected a training's checkpoint or a model, got neither. NOTHING: not on the hub."
    assert told in refused.stderr


def test_training_data_that_is_not_there_is_refused_before_ranks_are_started(work: Work) -> None:
    work.error = AssertionError("ranks were started")
    refused = runner.invoke(app, ["train", "m", "no.txt", "--output-dir", "out"])
    assert refused.exit_code == 1, refused.exception
    assert "no.txt: expected a file of training data: [Errno 2] No such file or directory" in refused.stderr
    assert not Path("out").exists()


def test_a_rank_of_a_launcher_looks_for_nothing(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert runner.invoke(app, ["verify", "no/such/model"]).exit_code == 0
