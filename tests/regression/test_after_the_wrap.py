"""What came into a model after it was sharded: adapters that each rank had for itself, embeddings of another size; by number of the case."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.facade import quiet_peft
from tests.distributed.models import VOCABULARY, PlainNet, check_equal, from_checkpoint
from tests.distributed.steps import (
    Checkpoint,
    backward,
    by_efficient,
    by_strategy,
    language_loss,
    load,
    make_strategy,
    own_rows,
    token_batch,
)

pytestmark = pytest.mark.distributed


@by_strategy
def test_case_23_an_adapter_beside_shards_is_refused(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    """It was put in after `fully_shard`: each rank trained one of its own, every loss looked right, and the first rank's was saved."""
    pytest.importorskip("peft")
    pool.run(add_late, checkpoint("qwen3_untied"), strategy, ranks=2)


def add_late(directory: str, name: str) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(dist.get_rank())
    strategy = make_strategy(name)
    base = strategy.wrap_model(load(strategy, directory, defer=True, dtype=torch.float32))
    config = LoraConfig(r=4, target_modules=["q_proj"])
    with pytest.raises((sw.CallOrderError, sw.PeerError), match="add_adapter: expected a model that is not"):
        strategy.add_adapter(base, config)
    with quiet_peft():
        model: Any = get_peft_model(base, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer, elsewhere = torch.optim.SGD(trained, lr=0.5), nn.Linear(2, 2)
    told = re.escape("q_proj.lora_B.default.weight, which came later")
    with pytest.raises((sw.OptimizerError, sw.PeerError), match=told):
        strategy.wrap_optimizer(optimizer)
    for (
        parameter
    ) in trained:  # some releases of PEFT take the local shape for the adapter's, and no forward runs
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):
        with pytest.raises(sw.OptimizerError, match=told):
            optimizer.step()
    assert all(torch.equal(now, then) for now, then in zip(trained, before, strict=True))
    torch.optim.SGD(elsewhere.parameters()).step()  # of no wrapped model


@by_strategy
@by_efficient
def test_what_was_left_whole_on_purpose_is_trained(pool: RankPool, strategy: str, efficient: bool) -> None:
    pool.run(train_ignored, strategy, efficient, ranks=2)


def train_ignored(name: str, efficient: bool) -> None:
    options = {"ignored_params": ["out.weight"]}
    strategy = make_strategy(name, memory_efficient_init=efficient, fsdp_config=options)
    model = PlainNet()
    model, optimizer = strategy.wrap_model(model, torch.optim.SGD(model.parameters(), lr=0.1))
    later = strategy.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for each in (optimizer, later):
        before = model.out.weight.detach().clone()
        backward(strategy, model(torch.ones(2, 8)).square().mean())
        each.step()
        assert not torch.equal(model.out.weight, before)


@by_strategy
@pytest.mark.parametrize("ranks", [1, 2])
def test_case_52_resizing_sharded_embeddings_is_refused_with_the_remedy(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, ranks: int
) -> None:
    """transformers stopped in the middle, with an error of torch about mixed tensors."""
    pool.run(resize_late, checkpoint("qwen3_tied"), strategy, ranks=ranks)


def resize_late(directory: str, name: str) -> None:
    strategy = make_strategy(name)
    model = strategy.wrap_model(load(strategy, directory, defer=True))
    resizings: tuple[Callable[[], Any], ...] = (
        lambda: model.resize_token_embeddings(VOCABULARY + 3),
        lambda: model.model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False),
    )
    for resize in resizings:
        with pytest.raises(sw.CallOrderError, match="Resize between load_pretrained and wrap_model"):
            resize()
    check_equal(model, from_checkpoint(directory))
    language_loss(model, own_rows(token_batch()))
