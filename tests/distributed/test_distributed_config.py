"""Models that transformers itself distributed from a `DistributedConfig`, on meta: filled as it laid them out.

transformers has no call that lays a model out without loading it. Its `from_pretrained` does both; the two class methods between
which it builds the model are public, and are called here. Tied weights are tied after the layout, as `from_pretrained` does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.layouts import require_same_shards
from tests.distributed.models import (
    causal_model,
    from_checkpoint,
    transformers_fuses_experts,
    write_checkpoint,
)
from tests.distributed.steps import local_of

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not transformers_fuses_experts(), reason="transformers 4.57 has no DistributedConfig"),
]

TIMEOUT_SECONDS = 60.0
LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "tensor": ("qwen3_untied", {"tp_size": 2, "fsdp_size": 2}),
    "tensor, tied": ("qwen3_tied", {"tp_size": 2, "fsdp_size": 2}),
    "shard, tied": ("qwen3_tied", {"fsdp_size": 4}),
    "replicate x shard": ("qwen3_untied", {"dp_replicate_size": 2, "fsdp_size": 2}),
    "experts x tensor": ("four_experts", {"tp_size": 2, "fsdp_size": 2}),
    "experts of half": ("four_experts", {"fsdp_size": 4, "ep_size": 2}),
    "experts of all": ("four_experts", {"fsdp_size": 4, "ep_size": 4}),
    "experts and tensor": ("four_experts", {"tp_size": 2, "fsdp_size": 2, "ep_size": 2}),
    "experts of replicas": ("four_experts", {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2}),
}


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function from a kind of model to the directory of its checkpoint."""
    root = tmp_path_factory.mktemp("distributed_config")

    def directory(kind: str) -> str:
        if not (root / kind).exists():
            if kind == "four_experts":
                write_four_experts(root / kind)
            else:
                write_checkpoint(kind, root / kind)
        return str(root / kind)

    return directory


def write_four_experts(directory: Path) -> None:
    """Save a model of which every number of ranks that is tried has equal shares of the experts."""
    import transformers

    config: Any = causal_model("qwen3_moe").config
    config.num_experts = 4
    torch.manual_seed(1)
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)


def laid_out(directory: str, sizes: dict[str, int], *, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a model on meta that transformers distributed."""
    from transformers import AutoConfig, AutoModelForCausalLM, initialization
    from transformers.distributed import DistributedConfig

    config = AutoConfig.from_pretrained(directory)
    cls = AutoModelForCausalLM._model_mapping[type(config)]
    distributed, _, meshes = cls.prepare_distribute_model(DistributedConfig(**sizes))
    with torch.device("meta"), initialization.no_tie_weights():
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype)
    model = cls.maybe_distribute_model(model, distributed, meshes)
    model.tie_weights()
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_transformers_laid_out_on_meta(
    pool: RankPool, directory_of: Callable[[str], str], layout: str
) -> None:
    kind, sizes = LAYOUTS[layout]
    pool.run(fill_and_compare, directory_of(kind), sizes, ranks=4)


def fill_and_compare(directory: str, sizes: dict[str, int]) -> None:
    """Fill a model as transformers laid it out: shards, buffers and outputs are those of transformers' own load."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    model = laid_out(directory, sizes)
    report = sw.materialize(model, directory, cpu_storage="copy", timeout=TIMEOUT_SECONDS)
    assert report.tensors["checkpoint"] == len(list(model.parameters()))
    assert sw.verify_shards(model, directory, timeout=TIMEOUT_SECONDS).is_equal
    own = AutoModelForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(**sizes))
    require_same_shards(model, own)
    ids = torch.arange(16).view(2, 8)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, own(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["qwen3_untied", "qwen3_tied", "four_experts"])
def test_a_plan_with_tensor_parallelism_says_what_is_read(
    pool: RankPool, directory_of: Callable[[str], str], kind: str
) -> None:
    plan = sw.plan_load(
        directory_of(kind),
        mesh_shape={"dp_shard": 2, "tp": 2},
        device="cpu",
        ranks_per_node=4,
        cpu_storage="copy",
        route="direct",
    )
    report = pool.run(fill, directory_of(kind), {"tp_size": 2, "fsdp_size": 2}, ranks=4)[0]
    got = report.storage_bytes, report.network_bytes, max(each.shard_bytes for each in report.ranks)
    assert (plan.storage_bytes, plan.network_bytes, plan.shard_bytes) == got


def fill(directory: str, sizes: dict[str, int]) -> sw.LoadReport:
    model = laid_out(directory, sizes)
    return sw.materialize(model, directory, cpu_storage="copy", route="direct", timeout=TIMEOUT_SECONDS)


def test_a_shard_without_experts_which_transformers_cannot_load(
    pool: RankPool, directory_of: Callable[[str], str]
) -> None:
    """Three experts over four ranks leave one without any; transformers' own loader fails there."""
    pool.run(fill_three_experts, directory_of("qwen3_moe"), ranks=4)


def fill_three_experts(directory: str) -> None:
    model = laid_out(directory, {"fsdp_size": 4}, dtype=torch.float32)
    sw.materialize(model, directory, timeout=TIMEOUT_SECONDS)
    stacks = [parameter for parameter in model.parameters() if parameter.ndim == 3]
    assert all(
        local_of(stack).shape[0] == (0 if torch.distributed.get_rank() == 3 else 1) for stack in stacks
    )
    assert sw.verify_shards(model, directory, timeout=TIMEOUT_SECONDS).is_equal
    ids = torch.arange(16).view(2, 8)
    expected = from_checkpoint(directory, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("sizes", [{"fsdp_size": 4, "ep_size": 2}, {"fsdp_size": 4, "ep_size": 4}], ids=str)
def test_clipping_over_the_meshes_of_experts_and_the_rest(
    pool: RankPool, directory_of: Callable[[str], str], sizes: dict[str, int]
) -> None:
    pool.run(clip_and_compare, directory_of("four_experts"), sizes, ranks=4)


def clip_and_compare(directory: str, sizes: dict[str, int]) -> None:
    """Train one pass on a batch that is the same on all ranks, and clip: norm and gradients are a single process's."""
    from tests.distributed.test_expert_meshes import clip_over_meshes, whole

    model = laid_out(directory, sizes, dtype=torch.float32)
    sw.materialize(model, directory, timeout=TIMEOUT_SECONDS)
    reference = from_checkpoint(directory, dtype=torch.float32)
    ids = torch.arange(32).view(4, 8)
    for each in (model, reference):
        each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    norm = clip_over_meshes(model.parameters(), max_norm=0.5)
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    torch.testing.assert_close(norm, expected)
    for (name, parameter), like in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            whole(parameter.grad), like.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
