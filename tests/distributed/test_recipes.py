"""The recipes, run on this machine with the command lines of `recipes/README.md`."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.distributed.agents import REPOSITORY, Ended, environment, free_port, run_all
from tests.distributed.models import write_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SECONDS = 200.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small checkpoint."""
    return str(write_checkpoint("qwen3_tied", tmp_path_factory.mktemp("recipes") / "model"))


def run_line(
    line: str, folder: Path, *, processes: int = 1, ranks_per_node: int = 2, **environ: str
) -> list[Ended]:
    """Run a command line of the guide, once for each machine, and require that it is there."""
    guide = (REPOSITORY / "recipes" / "README.md").read_text()
    assert f"{line.split(' CHECKPOINT')[0]} CHECKPOINT" in guide
    filled = line.replace("CHECKPOINT", environ.pop("CHECKPOINT")).replace("HOST", "127.0.0.1")
    filled = filled.replace("RANKS_PER_NODE=2", f"RANKS_PER_NODE={ranks_per_node}")
    lines = [filled.replace("NODE_RANK=N", f"NODE_RANK={number}") for number in range(processes)]
    commands = [["bash", "-c", each] for each in lines]
    return run_all(
        commands, [environment(HF_HUB_OFFLINE="1", **environ)] * processes, folder, seconds=SECONDS
    )


def require_good(ended: list[Ended], says: str) -> None:
    for each in ended:
        assert each.status == 0, each.output
    assert any(says in each.output for each in ended), ended


def test_torchrun_on_one_machine(model: str, tmp_path: Path) -> None:
    line = "RANKS_PER_NODE=2 bash recipes/torchrun_node.sh examples/native.py CHECKPOINT"
    require_good(run_line(line, tmp_path, CHECKPOINT=model), "loss ")


def test_torchrun_on_two_machines(model: str, tmp_path: Path) -> None:
    line = (
        "FIRST_NODE=HOST NODES=2 NODE_RANK=N RANKS_PER_NODE=2 "
        "bash recipes/torchrun_nodes.sh examples/native.py CHECKPOINT"
    )
    # With two on each: test_two_nodes.py.
    ended = run_line(line, tmp_path, processes=2, ranks_per_node=1, CHECKPOINT=model, PORT=str(free_port()))
    require_good(ended, "loss ")


def test_accelerate_on_cpus(model: str, tmp_path: Path) -> None:
    line = "accelerate launch --config_file recipes/accelerate_cpu.yaml examples/accelerate_strategy.py CHECKPOINT"
    require_good(
        run_line(line, tmp_path, CHECKPOINT=model, MASTER_PORT=str(free_port())),
        "loss ",
    )


# One task for each of two machines; as with --kill-on-bad-exit the first bad status ends all, and is the step's.
SRUN = """
import os, subprocess, sys, time

command = [each for each in sys.argv[1:] if not each.startswith("--")]
tasks = [subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node)}) for node in (0, 1)]
while None in [task.poll() for task in tasks] and not any(task.poll() for task in tasks):
    time.sleep(0.05)
for task in tasks:
    if task.poll() is None:
        task.terminate()
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Stand-ins for Slurm's commands, on the path, and the variables of a job on two machines."""
    tools = tmp_path / "slurm"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/usr/bin/env bash\nprintf '127.0.0.1\\nother\\n'\n")
    (tools / "srun").write_text(f"#!{sys.executable}\n{SRUN}")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return {
        "PATH": os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_JOB_NODELIST": "localhost,other",
        "SLURM_NNODES": "2",
        "RANKS_PER_NODE": "2",
        "HF_HUB_OFFLINE": "1",
    }


def test_slurm(model: str, tmp_path: Path, slurm: dict[str, str]) -> None:
    command = ["bash", "recipes/slurm.sbatch", "examples/native.py", model]
    one_each = environment() | slurm | {"RANKS_PER_NODE": "1"}
    require_good(run_all([command], [one_each], tmp_path, seconds=SECONDS), "loss ")


DIES = """
import os, signal, sys, time
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import shardwise as sw
from shardwise.checkpoint import SafetensorsSource

dist.init_process_group("gloo")
with torch.device("meta"):
    model = torch.nn.Linear(64, 64, bias=False)
fully_shard(model)

def killed(*_):
    print(f"killed at {time.time()}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if dist.get_rank() == 3:
    SafetensorsSource.read_scattered = killed
sw.materialize(model, sys.argv[1], cpu_storage="copy", route="direct", timeout=600)
"""


def test_a_killed_rank_ends_the_job_on_all_machines_within_30_seconds(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    save_file({"weight": torch.ones(64, 64)}, tmp_path / "model.safetensors")
    (tmp_path / "dies.py").write_text(DIES)
    command = ["bash", "recipes/slurm.sbatch", str(tmp_path / "dies.py"), str(tmp_path)]
    started = time.time()
    (ended,) = run_all([command], [environment() | slurm], tmp_path, seconds=SECONDS)
    assert ended.status != 0
    died = float(ended.output.split("killed at ")[1].split()[0]) - started
    assert ended.seconds - died < 30
    assert "exitcode  : -9" in ended.output  # torchrun's own words
    assert "rank      : 3 (local_rank: 1)" in ended.output


def test_a_killed_rank_ends_the_job_where_each_machine_has_a_launcher_of_its_own(tmp_path: Path) -> None:
    """Nothing tells the first machine's launcher of it but its ranks."""
    save_file({"weight": torch.ones(64, 64)}, tmp_path / "model.safetensors")
    (tmp_path / "dies.py").write_text(DIES)
    command = ["bash", "recipes/torchrun_nodes.sh", str(tmp_path / "dies.py"), str(tmp_path)]
    common = {"FIRST_NODE": "127.0.0.1", "PORT": str(free_port()), "NODES": "2", "RANKS_PER_NODE": "2"}
    environments = [environment(**common, NODE_RANK=str(node)) for node in (0, 1)]
    started = time.time()
    first, second = run_all([command] * 2, environments, tmp_path, seconds=SECONDS)
    assert first.status != 0
    assert second.status != 0
    died = float(second.output.split("killed at ")[1].split()[0]) - started
    assert first.seconds - died < 30
    assert "rank      : 3 (local_rank: 1)" in second.output  # torchrun's own words
    # Seen by a rank of the first machine, or by rank 2 where its launcher takes a second to end it.
    assert re.search(
        r"rank [23] on \S+ has ended, or its machine is gone: its connection to rank [012] closed without a word",
        first.output,
    )


def test_ray_train(model: str, tmp_path: Path) -> None:
    pytest.importorskip("ray.train", reason="Ray is an extra of its own: pip install 'shardwise[ray]'")
    line = "python recipes/ray_train.py CHECKPOINT --workers 2 --cpu"
    ended = run_line(line, tmp_path, CHECKPOINT=model, RAY_USAGE_STATS_ENABLED="0")
    require_good(ended, "route direct on 2 workers")
