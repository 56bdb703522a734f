"""Every option of `fsdp_config`, alike with both strategies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, Shard

import shardwise as sw
from shardwise.materialization import clean_fqn
from shardwise.testing import RankPool
from tests.distributed.models import PlainNet, check_equal, from_checkpoint, gathered
from tests.distributed.steps import (
    Checkpoint,
    backward,
    by_efficient,
    by_strategy,
    check_gradients,
    language_loss,
    load,
    make_strategy,
    own_rows,
    reference_gradients,
    token_batch,
)

pytestmark = pytest.mark.distributed


def units_of(model: nn.Module) -> set[str]:
    """Return the clean names of the modules that are FSDP2 units."""
    return {clean_fqn(f"{fqn}.").rstrip(".") for fqn, m in model.named_modules() if isinstance(m, FSDPModule)}


# --- which modules become units ---


@by_strategy
def test_each_decoder_layer_and_the_tied_embedding_become_units(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    tied, untied, gpt2 = (
        pool.run(units_after_wrap, checkpoint(kind), strategy, {}, ranks=2)[1]
        for kind in ("qwen3_tied", "qwen3_untied", "gpt2")
    )
    layers = {"model.layers.0", "model.layers.1"}
    assert untied == {"", "model.embed_tokens", "lm_head", *layers}
    assert tied == {"", "model.embed_tokens", "lm_head", *layers}
    assert gpt2 == {"", "transformer.wte", "lm_head", "transformer.h.0", "transformer.h.1"}


@by_strategy
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"auto_wrap_policy": "none"}, {""}),
        ({"wrap_classes": ["Qwen3MLP"]}, {"model.layers.0.mlp", "model.layers.1.mlp"}),
        ({"wrap_classes": "Qwen3DecoderLayer"}, {"model.layers.0", "model.layers.1"}),
    ],
    ids=["none", "list", "one name"],
)
def test_wrap_classes_and_policies(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, options: dict[str, Any], expected: set[str]
) -> None:
    [units, _] = pool.run(units_after_wrap, checkpoint("qwen3_tied"), strategy, options, ranks=2)
    if options.get("auto_wrap_policy") != "none":
        expected = {*expected, "", "model.embed_tokens", "lm_head"}
    assert units == expected


def units_after_wrap(directory: str, name: str, options: dict[str, Any]) -> set[str]:
    strategy = make_strategy(name, fsdp_config=options)
    model = strategy.wrap_model(load(strategy, directory))
    check_equal(model, from_checkpoint(directory))
    return units_of(model)


@by_strategy
def test_a_policy_function_chooses_units(pool: RankPool, strategy: str) -> None:
    for units in pool.run(units_by_function, strategy, ranks=2):
        assert units == {"", "layers.0.up", "layers.1.up"}


def units_by_function(name: str) -> set[str]:
    def wide(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and module.out_features == 17

    return units_of(make_strategy(name, fsdp_config={"auto_wrap_policy": wide}).wrap_model(PlainNet()))


# --- resharding, offload, checkpointing: the same gradients ---


@by_strategy
@by_efficient
@pytest.mark.parametrize(
    "options",
    [
        {"reshard_after_forward": True},
        {"reshard_after_forward": False},
        {"sharding_strategy": "SHARD_GRAD_OP", "backward_prefetch": "BACKWARD_PRE"},
        {"activation_checkpointing": True},
    ],
    ids=["reshard", "no reshard", "shard grad op", "activation checkpointing"],
)
def test_options_leave_the_gradients_equal(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, efficient: bool, options: dict[str, Any]
) -> None:
    pool.run(compare_with_option, checkpoint("qwen3_tied"), strategy, efficient, options, ranks=2)


def compare_with_option(directory: str, name: str, efficient: bool, options: dict[str, Any]) -> None:
    given = dict(options)
    strategy = make_strategy(name, memory_efficient_init=efficient, fsdp_config=options)
    assert options == given
    model = strategy.wrap_model(load(strategy, directory, dtype=torch.float32))
    check_equal(model, from_checkpoint(directory, dtype=torch.float32))
    checkpointed = [fqn for fqn, _ in model.named_modules() if fqn.endswith("_checkpoint_wrapped_module")]
    assert len(checkpointed) == (2 if options.get("activation_checkpointing") else 0)
    model.train()
    loss = language_loss(model, own_rows(token_batch()))
    layer = model.get_submodule("model.layers.0")
    whole = [not isinstance(p, DTensor) for p in layer.parameters()]
    stays = options.get("reshard_after_forward") is False or "sharding_strategy" in options
    assert set(whole) == {stays}  # still gathered between forward and backward, or not
    backward(strategy, loss)
    check_gradients(model, reference_gradients(directory))


@by_strategy
@by_efficient
@pytest.mark.parametrize("policy", ["flag", "pinned", "not pinned"])
def test_cpu_offload_on_a_cpu_mesh(pool: RankPool, strategy: str, efficient: bool, policy: str) -> None:
    pool.run(offload, strategy, efficient, policy, ranks=2)


def offload(name: str, efficient: bool, policy: str) -> None:
    value = True if policy == "flag" else CPUOffloadPolicy(pin_memory=policy == "pinned")
    strategy = make_strategy(name, memory_efficient_init=efficient, fsdp_config={"cpu_offload": value})
    model = PlainNet()
    if efficient and dist.get_rank() != 0:
        model = model.to("meta")
    model = strategy.wrap_model(model)
    check_equal(model, PlainNet())
    inputs = torch.randn(2 * dist.get_world_size(), 8, generator=torch.Generator().manual_seed(5))
    reference = PlainNet()
    reference(inputs).square().mean().backward()
    backward(strategy, model(own_rows(inputs)).square().mean())
    check_gradients(model, reference)


# --- placement and ignored parameters ---


@by_strategy
@by_efficient
def test_parameters_can_be_sharded_on_another_dim(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, efficient: bool
) -> None:
    pool.run(shard_on_dim_1, checkpoint("qwen3_moe"), strategy, efficient, ranks=4)


def on_dim_1(parameter: nn.Parameter) -> Shard | None:
    fits = parameter.ndim > 1 and parameter.shape[1] % 4 == 0
    return Shard(1) if fits else None


def shard_on_dim_1(directory: str, name: str, efficient: bool) -> None:
    strategy = make_strategy(
        name, memory_efficient_init=efficient, fsdp_config={"shard_placement_fn": on_dim_1}
    )
    model = strategy.wrap_model(load(strategy, directory, dtype=torch.float32))
    by_dim: dict[int, int] = {}
    for parameter in model.parameters():
        (placement,) = parameter.placements
        by_dim[placement.dim] = by_dim.get(placement.dim, 0) + 1
    assert by_dim[1] > 10
    assert by_dim[0] > 0  # norms
    assert all(p.to_local().numel() > 0 for p in model.parameters())
    check_equal(model, from_checkpoint(directory, dtype=torch.float32))
    backward(strategy, language_loss(model, own_rows(token_batch())))
    check_gradients(model, reference_gradients(directory))


@by_strategy
@by_efficient
def test_ignored_parameters_stay_whole(pool: RankPool, strategy: str, efficient: bool) -> None:
    pool.run(ignore_parameters, strategy, efficient, ranks=3)


def ignore_parameters(name: str, efficient: bool) -> None:
    strategy = make_strategy(
        name,
        memory_efficient_init=efficient,
        fsdp_config={"ignored_params": ["layers.0.scale", "out.weight"]},
    )
    model = PlainNet(seed=dist.get_rank() if efficient else 0)
    model = strategy.wrap_model(model)
    whole = {fqn for fqn, p in model.named_parameters() if not isinstance(p, DTensor)}
    assert whole == {"layers.0.scale", "out.weight"}
    check_equal(model, PlainNet(seed=0))
    model(torch.randn(2, 8)).sum().backward()
    assert model.out.weight.grad is not None


# --- what is refused ---


@by_strategy
@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (
            {"reshard_after_foward": True},
            ["unknown keys reshard_after_foward", "reshard_after_forward", "wrap_classes"],
        ),
        ({"auto_wrap_policy": "size"}, ["auto_wrap_policy", "'transformer', 'none'", "'size'"]),
        ({"sharding_strategy": "NO_SHARD"}, ["sharding_strategy", "FULL_SHARD", "DistributedDataParallel"]),
        (
            {"sharding_strategy": "FULL_SHARD", "reshard_after_forward": False},
            ["FULL_SHARD", "reshard_after_forward=True", "one of the two"],
        ),
        ({"backward_prefetch": "BACKWARD_POST"}, ["backward_prefetch", "BACKWARD_PRE", "BACKWARD_POST"]),
        ({"activation_checkpointing": "yes"}, ["activation_checkpointing", "bool", "'yes'"]),
        (
            {"cpu_ram_efficient_loading": False},
            ["memory_efficient_init=True", "cpu_ram_efficient_loading", "same switch"],
        ),
    ],
)
def test_wrong_options_are_refused_before_anything_happens(
    pool: RankPool, strategy: str, options: dict[str, Any], texts: list[str]
) -> None:
    for error in pool.run_to_errors(make_with_options, strategy, options, ranks=2):
        assert isinstance(error, sw.ConfigurationError), error
        for text in texts:
            assert text in str(error)


def make_with_options(name: str, options: dict[str, Any]) -> None:
    make_strategy(name, memory_efficient_init=True, fsdp_config=options)


@by_strategy
def test_accelerates_word_for_the_switch(pool: RankPool, strategy: str) -> None:
    assert pool.run(switch_of, strategy, False, ranks=1) == [False]
    assert pool.run(switch_of, strategy, True, ranks=1) == [True]


def switch_of(name: str, value: bool) -> bool:
    switch: bool = make_strategy(name, fsdp_config={"cpu_ram_efficient_loading": value}).memory_efficient_init
    return switch


@by_strategy
@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"wrap_classes": ["Blok"]}, ["wrap_classes", "Blok", "Classes that occur", "Block"]),
        ({"ignored_params": ["out.wieght"]}, ["ignored_params", "out.wieght"]),
    ],
)
def test_names_that_the_model_does_not_have(
    pool: RankPool, strategy: str, options: dict[str, Any], texts: list[str]
) -> None:
    for error in pool.run_to_errors(wrap_with_options, strategy, options, ranks=2):
        assert isinstance(error, sw.ConfigurationError), error
        for text in texts:
            assert text in str(error)


def wrap_with_options(name: str, options: dict[str, Any]) -> None:
    model = make_strategy(name, fsdp_config=options).wrap_model(PlainNet())
    gathered(model)
