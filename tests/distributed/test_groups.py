"""`group=`: a part of the ranks fills a model; two models in one process do not meet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.materialization.storage import fsdp_params_of
from shardwise.testing import RankPool
from tests.distributed.models import check_equal, from_checkpoint
from tests.distributed.steps import Checkpoint, local_of

pytestmark = pytest.mark.distributed

SMALL = 80  # tensors, enough of them to be exchanged
TIMEOUT_SECONDS = 60.0


def net() -> nn.Module:
    model = nn.Module()
    model.up = nn.Linear(16, 23)
    model.small = nn.ModuleList(nn.Linear(8, 6, bias=False) for _ in range(SMALL))
    return model


def other_net() -> nn.Module:
    model = nn.Module()
    model.up = nn.Linear(5, 9)
    model.table = nn.Embedding(31, 7)
    return model


@pytest.fixture
def files(tmp_path: Path) -> str:
    torch.manual_seed(0)
    for name, model in (("net", net()), ("other", other_net())):
        save_file(
            {key: torch.randn_like(value) for key, value in model.state_dict().items()},
            tmp_path / f"{name}.safetensors",
        )
    return str(tmp_path)


def on_meta(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    model = model.to("meta")
    fully_shard(model, mesh=mesh)
    return model


def check(model: nn.Module, file: str) -> None:
    expected = load_file(file)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), expected[name]), name


# --- a part of the ranks ---


@pytest.mark.parametrize("members", [(1, 3), (2, 0)], ids=["in order", "in another order"])
def test_two_of_four_ranks_fill_a_model_while_the_others_do_something_else(
    pool: RankPool, files: str, members: tuple[int, int]
) -> None:
    calls = pool.run(fill_on_two, files, members, ranks=4)
    assert [made for made in calls if made is not None] == [2, 2]


def fill_on_two(folder: str, members: tuple[int, int]) -> int | None:
    """Return how many ranks the report is of; None on ranks that make no call."""
    group = dist.new_group(members)
    rank = dist.get_rank()
    if rank not in members:
        return None
    mesh = DeviceMesh.from_group(group, "cpu")
    model = on_meta(net(), mesh)
    report = sw.materialize(
        model, f"{folder}/net.safetensors", group=group, cpu_storage="copy", timeout=TIMEOUT_SECONDS
    )
    check(model, f"{folder}/net.safetensors")
    assert sorted(each.rank for each in report.ranks) == sorted(members)
    assert report.network_bytes > 0  # the small tensors went between these two
    assert sw.verify_shards(model, f"{folder}/net.safetensors", group=group, timeout=TIMEOUT_SECONDS).is_equal
    return len(report.ranks)


def test_two_groups_fill_different_models_at_the_same_time(pool: RankPool, files: str) -> None:
    pool.run(fill_in_halves, files, ranks=4)


def fill_in_halves(folder: str) -> None:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = dist.get_rank() // 2
    name, build = (("net", net), ("other", other_net))[own]
    model = on_meta(build(), DeviceMesh.from_group(halves[own], "cpu"))
    file = f"{folder}/{name}.safetensors"
    for _ in range(2):  # the second call fills the same storage again
        sw.materialize(model, file, group=halves[own], cpu_storage="copy", timeout=TIMEOUT_SECONDS)
        check(model, file)
        with torch.no_grad():
            for parameter in model.parameters():
                local_of(parameter).zero_()


def test_a_failure_in_one_group_is_no_affair_of_the_other(pool: RankPool, files: str) -> None:
    pool.run(fail_in_one_half, files, ranks=4)


def fail_in_one_half(folder: str) -> None:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank = dist.get_rank()
    group = halves[rank // 2]
    model = on_meta(other_net(), DeviceMesh.from_group(group, "cpu"))
    if rank < 2:
        with pytest.raises(sw.ShardwiseError, match="got none for"):
            sw.materialize(model, f"{folder}/net.safetensors", group=group, timeout=TIMEOUT_SECONDS)
    file = f"{folder}/other.safetensors"
    sw.materialize(model, file, group=group, timeout=TIMEOUT_SECONDS)
    check(model, file)


# --- several models in one process ---


def test_two_models_in_one_process(pool: RankPool, files: str, checkpoint: Checkpoint) -> None:
    pool.run(fill_two_models, files, checkpoint("gpt2"), ranks=2)


def fill_two_models(folder: str, gpt2: str) -> None:
    """A plain module and a model of transformers, filled in turn; each keeps its values and trains alone."""
    first = on_meta(other_net())
    sw.materialize(first, f"{folder}/other.safetensors", timeout=TIMEOUT_SECONDS)
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        second = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(gpt2))
    second.tie_weights()
    fully_shard(second)
    sw.materialize(second, gpt2, dtype="auto", timeout=TIMEOUT_SECONDS)
    check(first, f"{folder}/other.safetensors")
    check_equal(second, from_checkpoint(gpt2))
    pointers = {p: p._sharded_param_data.data_ptr() for p in fsdp_params_of(first)}
    with torch.no_grad():
        for parameter in second.parameters():
            local_of(parameter).fill_(1)
    check(first, f"{folder}/other.safetensors")
    sw.materialize(first, f"{folder}/other.safetensors", timeout=TIMEOUT_SECONDS)
    assert {p: p._sharded_param_data.data_ptr() for p in fsdp_params_of(first)} == pointers
    assert all(local_of(parameter).eq(1).all() for parameter in second.parameters())
