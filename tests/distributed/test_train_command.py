"""`shardwise train` as a user starts it: own ranks, a pre-emption, the command that goes on, and a kill of all processes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.training import metrics_of, write_model, write_text

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SECONDS = 240


def command(folder: Path) -> list[str]:
    line = "train MODEL TEXT --output-dir OUT --ranks 2 --steps 120 --block-size 16 --mixed-precision no --lr 0.01 --warmup-steps 2"
    named = {"MODEL": str(folder / "model"), "TEXT": str(folder / "text.txt"), "OUT": str(folder / "out")}
    return [named.get(word, word) for word in line.split()]


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shardwise", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def wait_until(reached: Callable[[], bool], started: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and started.poll() is None and not reached():
        time.sleep(0.02)


def kill_all(started: subprocess.Popen[str]) -> None:
    """Kill a launcher and its ranks, none of which hears of it."""
    listed = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True, check=True)
    ranks = [int(pid) for pid in listed.stdout.split()]
    assert len(ranks) >= 2
    for pid in (started.pid, *ranks):
        os.kill(pid, signal.SIGKILL)
    started.communicate(timeout=SECONDS)


def test_a_pre_empted_and_a_killed_training_go_on(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    out = tmp_path / "out"
    metrics, checkpoints = out / "metrics.jsonl", out / "checkpoints"
    started = start(command(tmp_path))
    wait_until(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) >= 3, started)
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=SECONDS)
    assert started.returncode == 128 + signal.SIGTERM, said  # the launcher's own; its ranks have saved
    taken = len(metrics_of(out))
    assert 3 <= taken < 120
    assert f"Stopped at step {taken} of 120" in said
    go_on = shlex.split(said.split("Go on with: ")[1].splitlines()[0])
    assert go_on[:3] == ["python", "-m", "shardwise"]
    assert go_on[-2:] == ["--resume", "auto"]

    killed = start([*go_on[3:], "--checkpoint-every", "2", "--keep", "2"])
    later = (taken // 2 + 2) * 2
    run, reached = checkpoints / f"step-{later:08d}" / "run.json", 0

    def is_beyond() -> bool:
        nonlocal reached
        reached = len(metrics.read_text().splitlines())
        return run.is_file() or reached > later

    wait_until(is_beyond, killed)
    assert later <= reached < 120
    kill_all(killed)
    before = {line["step"]: line["loss"] for line in metrics_of(out)}

    report = tmp_path / "report.json"
    last = ["--ranks", "1", "--checkpoint-every", "120", "--keep", "1", "--json", str(report)]
    done = start([*go_on[3:], *last])
    shown, said = done.communicate(timeout=SECONDS)
    assert done.returncode == 0, said
    outcome = json.loads(report.read_text())
    assert (outcome["step"], outcome["ranks"], outcome["storage_bytes"], outcome["stopped"]) == (
        120,
        1,
        0,
        False,
    )
    assert int(Path(outcome["resumed_from"]).name.removeprefix("step-")) > taken
    after = {line["step"]: line["loss"] for line in metrics_of(out)}
    assert list(after) == list(range(1, 121))
    assert before == pytest.approx({step: after[step] for step in before}, rel=1e-4)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000120"]
    assert "step 120 of 120: loss" in said
    assert f"Written for from_pretrained: {out / 'export'}" in shown
