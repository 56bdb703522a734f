"""The ways of other libraries that `shardwise compare --peers` runs end with the checkpoint's values too."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import shardwise as sw
from shardwise.compare.modes import PEER_NAMES
from shardwise.compare.peers import PEERS, report_of_peer
from shardwise.errors import CommandError
from shardwise.testing import RankPool
from tests.distributed.models import check_equal, from_checkpoint, transformers_fuses_experts
from tests.distributed.steps import Checkpoint

pytestmark = pytest.mark.distributed


def bring_up(name: str, directory: str, replicas: int = 1) -> tuple[str, int, int, int]:
    from transformers import AutoModelForCausalLM

    shape = (dist.get_world_size(),) if replicas == 1 else (replicas, dist.get_world_size() // replicas)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "dp_shard")[-len(shape) :])
    peer = PEERS[name](mesh)
    with sw.profile_memory() as profile:
        model = peer.load_pretrained(AutoModelForCausalLM, directory, dtype="auto")
        model = peer.wrap_model(model)
    check_equal(model, from_checkpoint(directory))
    report = report_of_peer(
        model, torch.optim.SGD(model.parameters()), profile, mode=name, model_name=directory
    )
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return (
        report.strategy,
        report.world_size,
        len(report.ranks),
        whole * replicas - sum(rank.shard_bytes for rank in report.ranks),
    )


@pytest.mark.parametrize("kind", ["qwen3_tied", "qwen3_untied"])
@pytest.mark.parametrize("name", [name for name in PEER_NAMES if name != "accelerate-stock"])
def test_a_peer_ends_with_the_checkpoint_s_values(
    pool: RankPool, checkpoint: Checkpoint, name: str, kind: str
) -> None:
    if name == "transformers-distributed" and not transformers_fuses_experts():
        pytest.skip("transformers 4.57 has no such way")
    assert pool.run(bring_up, name, checkpoint(kind), ranks=2) == [(name, 2, 2, 0)] * 2


@pytest.mark.parametrize("name", [name for name in PEER_NAMES if name != "accelerate-stock"])
def test_a_peer_s_replicas_keep_whole_copies(pool: RankPool, checkpoint: Checkpoint, name: str) -> None:
    if name == "transformers-distributed" and not transformers_fuses_experts():
        pytest.skip("transformers 4.57 has no such way")
    assert pool.run(bring_up, name, checkpoint("qwen3_tied"), 2, ranks=4) == [(name, 4, 4, 0)] * 4


def refuse_on_cpu(name: str) -> str:
    with pytest.raises(CommandError) as error:
        PEERS[name](init_device_mesh("cpu", (dist.get_world_size(),)))
    return str(error.value)


def test_stock_accelerate_says_why_it_does_not_shard_here(pool: RankPool) -> None:
    (message,) = pool.run(refuse_on_cpu, "accelerate-stock", ranks=1)
    assert "for accelerator ranks only" in message
