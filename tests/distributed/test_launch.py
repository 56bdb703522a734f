"""Local ranks through torch's elastic launcher: results, errors with their rank, statuses, nothing left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardwise.compare.announce import announce
from shardwise.compare.launch import refuse_inside_launcher, run_ranks
from shardwise.errors import CommandError, ConfigurationError, PeerError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _collect_launchers() -> Iterator[None]:
    """Let go of each launcher here: torch's keep-alive timer fails when its own thread is the one that collects it."""
    yield
    gc.collect()


def grace() -> str:
    return os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]


def sum_of_ranks(arguments: Mapping[str, Any]) -> dict[str, Any]:
    announce(f"adding {arguments['add']}")
    print("to the log, not to the terminal")
    dist.init_process_group("gloo")
    total = torch.tensor([dist.get_rank() + arguments["add"]])
    dist.all_reduce(total)
    rank = dist.get_rank()
    dist.destroy_process_group()
    return {"rank": rank, "total": int(total), "threads": os.environ["OMP_NUM_THREADS"], "grace": grace()}


def fail_on_rank_1(arguments: Mapping[str, Any]) -> None:
    dist.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        raise ValueError("layers.3: cut short")
    try:
        dist.barrier()
    except RuntimeError as error:
        raise PeerError("another rank failed first") from error


def die_on_rank_1(arguments: Mapping[str, Any]) -> None:
    dist.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def end_the_launcher(arguments: Mapping[str, Any]) -> None:
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), getattr(signal, arguments["signal"]))
    time.sleep(60)
    Path(arguments["slept"]).touch()


def leave_on_rank_0(arguments: Mapping[str, Any]) -> None:
    if os.environ["RANK"] == "0":
        print("the last words", file=sys.stderr, flush=True)
        os._exit(7)


def without_torchs_warnings(text: str) -> str:
    """Return what was written to standard error but for what torch's store says of a machine without IPv6, or whose name is unknown."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("[W"))


def run(worker: Any, tmp_path: Path, *, said: list[str] | None = None, **arguments: Any) -> dict[int, Any]:
    progress = (lambda message: None) if said is None else said.append
    return run_ranks(worker, arguments, ranks=2, log_directory=tmp_path / "logs", progress=progress)


def test_two_ranks_work_together_and_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    said: list[str] = []
    results = run(sum_of_ranks, tmp_path, said=said, add=10)
    assert results == {rank: {"rank": rank, "total": 21, "threads": "1", "grace": "10"} for rank in (0, 1)}
    assert said == ["adding 10"]
    assert dict(os.environ) == environment
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "to the log" not in capfd.readouterr().out
    logs = {path.parent.name: path.read_text() for path in (tmp_path / "logs").rglob("stdout.log")}
    assert logs == dict.fromkeys(("0", "1"), "to the log, not to the terminal\n")


def test_a_killed_rank_is_the_cause_and_not_its_peers(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"rank 1 of 2 failed first: it was ended by SIGKILL\. Most often"):
        run(die_on_rank_1, tmp_path)


def test_a_rank_that_says_nothing_is_quoted_and_a_second_launch_works_with_the_threads_that_the_user_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        CommandError, match=r"(?s)rank 0 of 2 failed first: it left with status 7.*the last words"
    ):
        run(leave_on_rank_0, tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    result = run(sum_of_ranks, tmp_path, add=1)[1]
    assert (result["total"], result["threads"]) == (3, "2")


def test_the_first_failing_rank_is_named_with_its_error_and_not_one_that_an_earlier_run_has_logged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):  # whichever is looked at first
        earlier = tmp_path / "logs" / name / "attempt_0" / "0"
        earlier.mkdir(parents=True)
        (earlier / "error.json").write_text('{"message": "of another run"}')
    with pytest.raises(
        CommandError, match=r"fail_on_rank_1: rank 1 of 2 failed first: ValueError: layers.3: cut short\."
    ) as caught:
        run(fail_on_rank_1, tmp_path)
    (logs,) = (path for path in (tmp_path / "logs").iterdir() if len(path.name) > 1)
    assert str(caught.value).endswith(f"The output of every rank is in {logs}.")
    assert "Traceback" in next(logs.rglob("1/stderr.log")).read_text()
    assert without_torchs_warnings(capfd.readouterr().err) == ""  # told once, by the error


@pytest.mark.parametrize(("name", "error"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", SystemExit)])
def test_a_signal_ends_the_ranks_and_this_process(
    tmp_path: Path, name: str, error: type[BaseException]
) -> None:
    slept = tmp_path / "slept"
    with pytest.raises(error) as caught:
        run(end_the_launcher, tmp_path, signal=name, slept=str(slept))
    assert not slept.exists()  # the ranks did not end by themselves
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 128 + signal.SIGTERM


def test_no_ranks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ranks: expected 1 or more, got 0"):
        run_ranks(sum_of_ranks, {}, ranks=0, log_directory=tmp_path, progress=print)


def only_its_rank(arguments: Mapping[str, Any]) -> int:
    return int(os.environ["RANK"]) * arguments["times"]


def test_where_the_ranks_are_there_already_the_worker_runs_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run(only_its_rank, tmp_path, times=5) == {3: 15}
    with pytest.raises(
        ConfigurationError, match="it: expected to be started as one plain process, got rank 3 of 4"
    ):
        refuse_inside_launcher("it", environ=os.environ)


def test_statuses_of_the_command(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from shardwise.compare.launch import run_ranks\n"
        "from shardwise.cli.terminal import errors_reported\n"
        "from tests.distributed import test_launch\n"
        "import typer\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        with errors_reported(debug=False):\n"
        "            run_ranks(getattr(test_launch, sys.argv[1]), {'add': 0}, ranks=2, "
        "log_directory=Path(sys.argv[2]), progress=print)\n"
        "    except typer.Exit as left:\n"
        "        sys.exit(left.exit_code)\n"
    )

    def status(worker: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, str(program), worker, str(tmp_path / worker)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "src")))},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, without_torchs_warnings(done.stderr)

    assert status("sum_of_ranks") == (0, "")
    failed, said = status("fail_on_rank_1")
    assert failed == 1
    assert said.startswith(
        "shardwise: fail_on_rank_1: rank 1 of 2 failed first: ValueError: layers.3: cut short."
    )
