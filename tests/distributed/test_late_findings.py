"""Failures that a review of the strategies brought to light; each test names what went wrong."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.models import PlainNet
from tests.distributed.steps import (
    by_strategy,
    make_strategy,
)

pytestmark = pytest.mark.distributed


def test_lbfgs_gets_the_shards_and_lets_go_of_the_full_parameters(pool: RankPool) -> None:
    """LBFGS keeps the list of its group under another name: a new list left it on the full parameters."""
    pool.run(wrap_with_lbfgs, ranks=2)


def wrap_with_lbfgs() -> None:
    model = PlainNet()
    gone = weakref.ref(next(model.parameters()))
    model, optimizer = make_strategy("native_fsdp").wrap_model(model, torch.optim.LBFGS(model.parameters()))
    gc.collect()
    assert gone() is None
    assert all(held is shard for held, shard in zip(optimizer._params, model.parameters(), strict=True))


@by_strategy
def test_an_optimizer_from_before_the_wrap_is_refused_on_every_rank(pool: RankPool, strategy: str) -> None:
    """It was accepted where the old parameters had values, and refused where they were on meta."""
    errors = pool.run_to_errors(join_late, strategy, "before", ranks=2)
    for error in errors:
        assert isinstance(error, (sw.OptimizerError, sw.PeerError)), error
        assert "parameters of a model that this strategy wrapped" in str(error)
        assert "Make the optimizer after wrap_model" in str(error)


@by_strategy
def test_an_optimizer_of_another_model_is_refused_later_too(pool: RankPool, strategy: str) -> None:
    for error in pool.run_to_errors(join_late, strategy, "other", ranks=2):
        assert isinstance(error, (sw.OptimizerError, sw.PeerError)), error


@by_strategy
def test_an_optimizer_on_the_shards_joins_later(pool: RankPool, strategy: str) -> None:
    pool.run(join_late, strategy, "after", ranks=2)


def join_late(name: str, when: str) -> None:
    strategy = make_strategy(name)
    model = PlainNet() if dist.get_rank() == 0 else PlainNet().to("meta")
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = strategy.wrap_model(model)
    late = torch.optim.SGD((PlainNet() if when == "other" else wrapped).parameters(), lr=0.1)
    strategy.wrap_optimizer(early if when == "before" else late)


def test_a_bert_head_tied_to_the_module_around_it(pool: RankPool) -> None:
    """`cls.predictions.bias` is also the bias of `cls.predictions.decoder`, the output head."""
    pool.run(wrap_bert, ranks=2)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)).eval()


def wrap_bert() -> None:
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected = bert()(input_ids=tokens).logits
        model = make_strategy("native_fsdp", mixed_precision="no").wrap_model(bert())
        torch.testing.assert_close(model(input_ids=tokens).logits, expected)


@pytest.mark.parametrize("option", ["auto_wrap_policy", "ignored_params", "activation_checkpointing"])
def test_options_that_decide_collectives_must_be_equal(pool: RankPool, option: str) -> None:
    """Ranks that sharded differently hung, or aborted, in the first forward."""
    for error in pool.run_to_errors(differ_in, option, ranks=2):
        assert isinstance(error, sw.RankMismatchError), error
        assert "with the same arguments on every rank" in str(error)


def differ_in(option: str) -> None:
    values: dict[str, Any] = {
        "auto_wrap_policy": "none",
        "ignored_params": ["layers.0.scale"],
        "activation_checkpointing": True,
    }
    config = {option: values[option]} if dist.get_rank() == 0 else {}
    make_strategy("native_fsdp", fsdp_config=config).wrap_model(PlainNet())


def test_a_part_of_a_larger_mesh(pool: RankPool) -> None:
    """The report refused ranks whose numbers do not begin at 0."""
    assert pool.run(wrap_on_a_part, ranks=4) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def wrap_on_a_part() -> list[int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp_shard"))
    strategy = make_strategy("native_fsdp", device_mesh=mesh["dp_shard"])
    strategy.wrap_model(PlainNet(seed=dist.get_rank()))
    assert strategy.last_report is not None
    assert strategy.last_report.world_size == 4
    return [rank.rank for rank in strategy.last_report.ranks]


def test_a_parameter_kept_under_a_second_role_is_refused(pool: RankPool) -> None:
    """The alias kept the full values, and was neither tied nor trained."""
    for error in pool.run_to_errors(wrap_alias, ranks=2):
        assert isinstance(error, (sw.UnsupportedParameterError, sw.PeerError)), error
        assert "attribute alias" in str(error)


def wrap_alias() -> None:
    model = PlainNet()
    model.__dict__["alias"] = next(model.parameters())
    make_strategy("native_fsdp").wrap_model(model)


def test_a_compiled_model_shards_the_one_inside(pool: RankPool) -> None:
    pool.run(wrap_compiled, ranks=2)


def wrap_compiled() -> None:
    inputs = torch.ones(2, 8)
    expected = PlainNet()(inputs)
    strategy = make_strategy("native_fsdp", mixed_precision="no")
    compiled = torch.compile(PlainNet(), backend="eager")
    wrapped = strategy.wrap_model(compiled)
    assert wrapped is compiled
    assert strategy.unwrap_model(wrapped) is compiled._orig_mod
    torch.testing.assert_close(wrapped(inputs), expected)


def test_a_second_strategy_leaves_the_first_ones_accumulation(pool: RankPool) -> None:
    """Accelerate's accumulation steps belong to the process; a second Accelerator set them back to 1."""
    pool.run(make_a_second, ranks=2)


def make_a_second() -> None:
    first = make_strategy("accelerate")
    first.accelerator.gradient_accumulation_steps = 4
    make_strategy("accelerate")
    assert first.accelerator.gradient_accumulation_steps == 4


def test_a_second_strategy_with_other_shared_options_is_refused(pool: RankPool) -> None:
    for error in pool.run_to_errors(make_a_different_second, ranks=2):
        assert isinstance(error, sw.ConfigurationError), error
        assert "reshard_after_forward" in str(error)


def make_a_different_second() -> None:
    make_strategy("accelerate")
    make_strategy("accelerate", fsdp_config={"reshard_after_forward": False})


def test_two_optimizers_warn_that_save_state_cannot_take_them(pool: RankPool) -> None:
    pool.run(wrap_with_two_optimizers, ranks=2)


def wrap_with_two_optimizers() -> None:
    model = PlainNet()
    first, *rest = model.parameters()
    optimizers = (torch.optim.SGD([first], lr=0.1), torch.optim.SGD(rest, lr=0.1))
    with pytest.warns(UserWarning, match="save_state pairs optimizers with models by position"):
        make_strategy("accelerate").wrap_model(model, *optimizers)


def test_a_plugin_object_that_accelerate_drops_is_refused(pool: RankPool) -> None:
    """On CPU ranks the adopted options were silently those of the environment."""
    for error in pool.run_to_errors(adopt_plugin_object, ranks=2):
        assert isinstance(error, sw.ConfigurationError), error
        assert "drops a plugin object on CPU ranks" in str(error)


def adopt_plugin_object() -> None:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, activation_checkpointing=True)
    sw.AccelerateStrategy(accelerator=Accelerator(cpu=True, fsdp_plugin=plugin))
