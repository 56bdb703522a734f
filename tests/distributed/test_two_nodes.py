"""Two launcher agents on one machine, as two machines: each has its own directory, its own ranks and its own reader."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from tests.distributed.agents import RECIPES, environment, free_port, run_all
from tests.distributed.models import write_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NODES, RANKS_PER_NODE = 2, 2


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What each rank saw in each case."""
    root = tmp_path_factory.mktemp("two-nodes")
    write_checkpoint("qwen3_tied", root / "node0" / "model")
    shutil.copytree(root / "node0" / "model", root / "node1" / "model")
    output = root / "output"
    output.mkdir()
    command = [
        "bash",
        str(RECIPES / "torchrun_nodes.sh"),
        "tests/distributed/two_nodes.py",
        str(root),
        str(output),
    ]
    common = {
        "FIRST_NODE": "127.0.0.1",
        "PORT": str(free_port()),
        "NODES": str(NODES),
        "RANKS_PER_NODE": str(RANKS_PER_NODE),
        "HF_HUB_OFFLINE": "1",
    }
    environments = [environment(**common, NODE_RANK=str(node)) for node in range(NODES)]
    for ended in run_all([command] * NODES, environments, root, seconds=200):
        assert ended.status == 0, ended.output
    return {int(path.stem): json.loads(path.read_text()) for path in output.glob("*.json")}


def test_ranks_are_numbered_by_node(seen: dict[int, Any]) -> None:
    places = {rank: (own["node"], own["local_rank"]) for rank, own in seen.items()}
    assert places == {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (1, 1)}
    names = [seen[rank]["own_node"] for rank in range(4)]
    assert names[0] == names[1] != names[2] == names[3]


@pytest.mark.parametrize(
    ("case", "route", "readers"),
    [
        ("every rank", "direct", [0, 1, 2, 3]),
        ("one rank of each node", "node", [0, 2]),
        ("the first node", "rank0", [0]),
    ],
)
def test_what_ranks_see_decides_who_reads(
    seen: dict[int, Any], case: str, route: str, readers: list[int]
) -> None:
    for rank, own in seen.items():
        of_case = own["seen"][case]
        assert of_case["equal"], rank
        assert (of_case["route"], of_case["readers"]) == (route, readers)
