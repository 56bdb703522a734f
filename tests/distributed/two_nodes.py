"""What each rank of `test_two_nodes.py` runs: python two_nodes.py DIRECTORY OUTPUT.

DIRECTORY has the checkpoint of each node, `node0/model` and `node1/model`; a rank looks at its own node's alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import shardwise as sw
from shardwise.profiling import own_node

NODE, LOCAL_RANK = int(os.environ["GROUP_RANK"]), int(os.environ["LOCAL_RANK"])
SEES = {
    "every rank": True,
    "one rank of each node": LOCAL_RANK == 0,
    "the first node": NODE == 0,
}


def load(root: Path, *, sees: bool) -> dict[str, Any]:
    """Load what this rank sees; return where the values came from and whether they are right."""
    directory = root / (f"node{NODE}" if sees else "nowhere") / "model"
    strategy = sw.NativeFSDPStrategy(mixed_precision="no", cpu_storage="copy", timeout=60)
    model = strategy.wrap_model(strategy.load_pretrained(AutoModelForCausalLM, str(directory)))
    expected = load_file(root / "node0" / "model" / "model.safetensors")
    got = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    assert strategy.last_report is not None
    report = strategy.last_report.to_json()
    return {
        "equal": all(torch.equal(value, expected[name]) for name, value in got.items()) and len(got) > 0,
        "route": report["route"],
        "readers": [each["rank"] for each in report["ranks"] if each["storage_bytes"] > 0],
    }


def main(root: Path, output: Path) -> None:
    """Run all cases, and write down what this rank saw."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    seen = {name: load(root, sees=sees) for name, sees in SEES.items()}
    own = {"rank": rank, "node": NODE, "local_rank": LOCAL_RANK, "own_node": own_node(), "seen": seen}
    (output / f"{rank}.json").write_text(json.dumps(own))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    # Without the interpreter's teardown, in which native threads of torch that are still joinable abort a rank now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
