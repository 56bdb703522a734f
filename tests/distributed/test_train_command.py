"""`shardwise train` as a user starts it: own ranks, a pre-emption, and the command that goes on."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.training import metrics_of, write_model, write_text

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SECONDS = 240


def command(folder: Path) -> list[str]:
    line = "train MODEL TEXT --output-dir OUT --ranks 2 --steps 120 --block-size 16 --mixed-precision no --lr 0.01 --warmup-steps 2"
    named = {"MODEL": str(folder / "model"), "TEXT": str(folder / "text.txt"), "OUT": str(folder / "out")}
    return [named.get(word, word) for word in line.split()]


def test_a_pre_empted_training_goes_on_by_the_command_that_it_prints(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [sys.executable, "-m", "shardwise", *command(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and started.poll() is None:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= 3:
            break
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=SECONDS)
    assert started.returncode == 128 + signal.SIGTERM, said  # the launcher's own; its ranks have saved
    taken = len(metrics_of(tmp_path / "out"))
    assert 3 <= taken < 120
    assert f"Stopped at step {taken} of 120" in said
    go_on = shlex.split(said.split("Go on with: ")[1].splitlines()[0])
    assert go_on[:3] == ["python", "-m", "shardwise"]
    assert go_on[-2:] == ["--resume", "auto"]

    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, *go_on[1:], "--json", str(report)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(report.read_text())
    assert (outcome["step"], outcome["storage_bytes"], outcome["stopped"]) == (120, 0, False)
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == list(range(1, 121))
    assert "step 120 of 120: loss" in done.stderr
    assert f"Written for from_pretrained: {tmp_path / 'out' / 'export'}" in done.stdout
