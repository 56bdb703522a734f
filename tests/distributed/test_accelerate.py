"""What is particular to `AccelerateStrategy`: the Accelerator drives the training, and may come from outside."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.models import PlainNet, TiedNet, check_equal, from_checkpoint, gathered
from tests.distributed.steps import (
    Checkpoint,
    full_gradients,
    language_loss,
    load,
    own_rows,
    reference_gradients,
    token_batch,
)

pytestmark = pytest.mark.distributed

LAUNCH_YAML = {
    # What `accelerate launch` makes of a YAML with fsdp_version: 2.
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3MLP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "ACCELERATE_MIXED_PRECISION": "bf16",
}


def accelerate_strategy(**arguments: Any) -> sw.AccelerateStrategy:
    return sw.AccelerateStrategy(**{"mixed_precision": "no", "timeout": 60.0, **arguments})


def inputs() -> torch.Tensor:
    """Return the whole job's batch of a plain model."""
    return torch.randn(2 * dist.get_world_size(), 8, generator=torch.Generator().manual_seed(5))


# --- the Accelerator drives the training ---


def test_backward_clips_and_norms_as_a_single_process_does(pool: RankPool, checkpoint: Checkpoint) -> None:
    pool.run(clip, checkpoint("qwen3_tied"), ranks=4)


def clip(directory: str) -> None:
    from accelerate import Accelerator

    strategy = accelerate_strategy()
    assert type(strategy.accelerator) is Accelerator
    assert strategy.accelerator.is_fsdp2
    model = load(strategy, directory, dtype=torch.float32)
    model, _ = strategy.wrap_model(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert strategy.accelerator.is_fsdp2  # also after Accelerate has made objects of its own
    reference = reference_gradients(directory)
    strategy.accelerator.backward(language_loss(model, own_rows(token_batch())))
    norm = strategy.accelerator.clip_grad_norm_(model.parameters(), 0.05)
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
    assert expected > 0.1  # it really clips
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    clipped = full_gradients(model)
    for fqn, parameter in reference.named_parameters():
        torch.testing.assert_close(clipped[fqn], parameter.grad, rtol=1e-4, atol=1e-6)


def test_accumulate_skips_the_step_until_gradients_are_whole(pool: RankPool) -> None:
    pool.run(accumulate, ranks=2)


def accumulate() -> None:
    from accelerate import Accelerator

    strategy = accelerate_strategy(accelerator=Accelerator(gradient_accumulation_steps=2, cpu=True))
    model = PlainNet()
    model, optimizer = strategy.wrap_model(model, torch.optim.SGD(model.parameters(), lr=0.1))
    reference = PlainNet()
    expected = torch.optim.SGD(reference.parameters(), lr=0.1)
    batches = [inputs(), inputs() * 2]
    before = gathered(model)
    for index, batch in enumerate(batches):
        with strategy.accelerator.accumulate(model):
            strategy.accelerator.backward(model(own_rows(batch)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        after = gathered(model)
        changed = [fqn for fqn in before if not torch.equal(before[fqn], after[fqn])]
        assert bool(changed) == (index == 1), f"after batch {index} changed: {changed}"
        (reference(batch).square().mean() / 2).backward()
    expected.step()
    for fqn, parameter in reference.named_parameters():
        torch.testing.assert_close(after[fqn], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_state_survives_a_round_trip(pool: RankPool, tmp_path: Path) -> None:
    pool.run(round_trip, str(tmp_path / "state"), ranks=3)


def round_trip(directory: str) -> None:
    strategy = accelerate_strategy()
    model = PlainNet()
    made = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer, scheduler = strategy.wrap_model(model, made, LambdaLR(made, lambda step: 0.5**step))

    def step() -> None:
        strategy.accelerator.backward(model(own_rows(inputs())).square().mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    step()
    saved, rates = gathered(model), scheduler.get_last_lr()
    moments = [optimizer.state[p]["exp_avg"].full_tensor().clone() for p in model.parameters()]
    strategy.accelerator.save_state(directory)
    dist.barrier()
    step()
    expected = gathered(model)
    assert not torch.equal(expected["out.weight"], saved["out.weight"])
    strategy.accelerator.load_state(directory)
    restored = gathered(model)
    for fqn, tensor in saved.items():
        assert torch.equal(restored[fqn], tensor), fqn
    for parameter, moment in zip(model.parameters(), moments, strict=True):
        assert torch.equal(optimizer.state[parameter]["exp_avg"].full_tensor(), moment)
    assert scheduler.get_last_lr() == rates
    step()  # and goes on as if it had not stopped
    for fqn, tensor in gathered(model).items():
        torch.testing.assert_close(tensor, expected[fqn])


def test_schedulers_and_data_loaders_are_prepared(pool: RankPool) -> None:
    seen = pool.run(prepare_all, ranks=2)
    assert sorted(seen[0] + seen[1]) == list(range(8))  # every row once, on one of the ranks


def prepare_all() -> list[int]:
    from accelerate.data_loader import DataLoaderShard
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler

    strategy = accelerate_strategy()
    model = PlainNet()
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = LambdaLR(made, lambda step: 0.5**step)
    rows = torch.arange(8).repeat_interleave(8).reshape(8, 8).float()
    loader = DataLoader(TensorDataset(rows), batch_size=2)
    # In another order than that in which they depend on each other.
    model, batches, scheduler, optimizer = strategy.wrap_model(model, loader, schedule, made)
    assert isinstance(batches, DataLoaderShard)
    assert isinstance(scheduler, AcceleratedScheduler)
    assert isinstance(optimizer, AcceleratedOptimizer)
    assert scheduler.scheduler is schedule
    assert optimizer.optimizer is made
    assert scheduler.optimizers == [optimizer]
    seen: list[int] = []
    for (batch,) in batches:
        seen += batch[:, 0].int().tolist()
        strategy.accelerator.backward(model(batch).square().mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    # Accelerate advances a scheduler once per rank and step.
    assert scheduler.get_last_lr() == pytest.approx([0.1 * 0.5**4])
    return seen


def test_a_second_model_in_one_accelerator_is_refused(pool: RankPool) -> None:
    pool.run(wrap_second_model, ranks=2)


def wrap_second_model() -> None:
    strategy = accelerate_strategy()
    strategy.wrap_model(PlainNet(seed=dist.get_rank()))
    with pytest.raises(
        sw.ConfigurationError,
        match=r"one FSDP2 model.*holds FSDPPlainNet already.*another AccelerateStrategy.*free_memory",
    ):
        strategy.wrap_model(TiedNet(seed=dist.get_rank()))
    strategy.accelerator.free_memory()
    check_equal(strategy.wrap_model(TiedNet(seed=dist.get_rank())), TiedNet(seed=0))


# --- an Accelerator from a launch YAML ---


def test_an_accelerator_from_a_launch_yaml_is_honoured(pool: RankPool, checkpoint: Checkpoint) -> None:
    pool.run(adopt, checkpoint("qwen3_untied"), ranks=2)


def adopt(directory: str) -> None:
    from accelerate import Accelerator

    os.environ.update(LAUNCH_YAML)
    accelerator = Accelerator(cpu=True)
    before = dict(os.environ)
    # The constructor's own precision is a default, not an order.
    strategy = sw.AccelerateStrategy(accelerator=accelerator, timeout=60.0)
    assert dict(os.environ) == before
    assert strategy.accelerator is accelerator
    assert strategy.mixed_precision == "bf16"
    assert strategy.memory_efficient_init is True
    assert strategy.fsdp_config.wrap_classes == ("Qwen3MLP",)
    assert strategy.fsdp_config.reshard is True
    plugin = accelerator.state.fsdp_plugin
    assert plugin.fsdp_version == 2
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    model = load(strategy, directory)
    assert {p.is_meta for p in model.parameters()} == {dist.get_rank() != 0}
    model = strategy.wrap_model(model)
    assert dict(os.environ) == before
    units = {fqn for fqn, module in model.named_modules() if isinstance(module, FSDPModule)}
    assert units == {"", "model.layers.0.mlp", "model.layers.1.mlp", "model.embed_tokens", "lm_head"}
    report = strategy.last_report
    assert report.dtypes["compute"] == "bfloat16"
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        del os.environ[name]
    check_equal(model, from_checkpoint(directory))
    logits = model(input_ids=own_rows(token_batch())).logits
    assert logits.dtype == torch.bfloat16


def test_efficient_loading_switched_off_in_the_yaml(pool: RankPool, checkpoint: Checkpoint) -> None:
    pool.run(adopt_without_efficient_loading, checkpoint("qwen3_tied"), ranks=2)


def adopt_without_efficient_loading(directory: str) -> None:
    from accelerate import Accelerator

    os.environ.update({**LAUNCH_YAML, "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"})
    strategy = sw.AccelerateStrategy(accelerator=Accelerator(cpu=True), timeout=60.0)
    assert strategy.memory_efficient_init is False
    model = load(strategy, directory)
    assert not any(p.is_meta for p in model.parameters())
    check_equal(strategy.wrap_model(model), from_checkpoint(directory))
    with pytest.raises(sw.ConfigurationError, match="same switch"):
        sw.AccelerateStrategy(accelerator=strategy.accelerator, memory_efficient_init=True)


@pytest.mark.parametrize("version", ["1", None])
def test_fsdp_version_1_is_refused(pool: RankPool, version: str | None) -> None:
    for error in pool.run_to_errors(adopt_version, version, ranks=2):
        assert isinstance(error, sw.ConfigurationError), error
        assert "fsdp_version: 2, got 1" in str(error)


def adopt_version(version: str | None) -> None:
    from accelerate import Accelerator

    # With efficient loading, Accelerate itself refuses FSDP1 on the CPU.
    os.environ.update({**LAUNCH_YAML, "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"})
    del os.environ["FSDP_VERSION"]
    if version is not None:
        os.environ["FSDP_VERSION"] = version
    sw.AccelerateStrategy(accelerator=Accelerator(cpu=True))


def test_options_given_twice_are_refused(pool: RankPool) -> None:
    pool.run(give_twice, ranks=1)


def give_twice() -> None:
    from accelerate import Accelerator

    os.environ.update(LAUNCH_YAML)
    accelerator = Accelerator(cpu=True)
    with pytest.raises(sw.ConfigurationError, match="its own FSDP plugin were both given"):
        sw.AccelerateStrategy(accelerator=accelerator, fsdp_config={"reshard_after_forward": False})
    with pytest.raises(sw.ConfigurationError, match="ddp_config and accelerator= were both given"):
        sw.AccelerateStrategy(accelerator=accelerator, ddp_config={"static_graph": True})


def test_an_accelerator_without_fsdp_options_takes_the_strategys(pool: RankPool) -> None:
    pool.run(adopt_plain, ranks=2)


def adopt_plain() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    strategy = sw.AccelerateStrategy(
        accelerator=accelerator, fsdp_config={"auto_wrap_policy": "none"}, timeout=60.0
    )
    assert strategy.mixed_precision == "bf16"
    model = strategy.wrap_model(TiedNet(seed=dist.get_rank()))
    assert [fqn for fqn, module in model.named_modules() if isinstance(module, FSDPModule)] == [""]
    check_equal(model, TiedNet(seed=0))
    assert model(torch.randint(0, 13, (2, 6))).dtype == torch.bfloat16


def test_the_constructors_arguments_override_the_environment_and_say_so(pool: RankPool) -> None:
    for lines in pool.run(override, ranks=2):
        (line,) = [text for text in lines if "override" in text]
        for name in (
            "ACCELERATE_MIXED_PRECISION",
            "FSDP_TRANSFORMER_CLS_TO_WRAP",
            "accelerator=Accelerator()",
        ):
            assert name in line


def override() -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("shardwise")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    os.environ.update(LAUNCH_YAML)
    before = dict(os.environ)
    try:
        strategy = accelerate_strategy(
            memory_efficient_init=False, fsdp_config={"reshard_after_forward": False}
        )
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert dict(os.environ) == before
    assert strategy.accelerator.mixed_precision == "no"
    plugin = strategy.accelerator.state.fsdp_plugin
    assert plugin.transformer_cls_names_to_wrap is None
    assert plugin.reshard_after_forward is False
    assert plugin.cpu_ram_efficient_loading is False
    assert strategy.memory_efficient_init is False
    # Two blocks become units; the class that the environment names does not occur in this model.
    model = strategy.wrap_model(PlainNet())
    units = {fqn for fqn, module in model.named_modules() if isinstance(module, FSDPModule)}
    assert units == {"", "layers.0", "layers.1"}
    return lines


def test_ddp_config_reaches_accelerate(pool: RankPool) -> None:
    pool.run(pass_ddp_config, ranks=1)


def pass_ddp_config() -> None:
    strategy = accelerate_strategy(ddp_config={"static_graph": True})
    assert strategy.accelerator.ddp_handler.static_graph is True
    with pytest.raises(sw.ConfigurationError, match="ddp_config"):
        accelerate_strategy(ddp_config={"statik_graph": True})


# --- why accelerate_compat.py is there ---


def test_stock_accelerate_still_replicates_on_cpu_ranks(pool: RankPool) -> None:
    for shares in pool.run(wrap_with_stock_accelerate, ranks=2):
        assert shares == 1.0, (
            f"stock Accelerate now keeps {shares:.0%} of the model on each of two CPU ranks: it shards there itself, and "
            "shardwise/strategies/accelerate_compat.py can go"
        )


def wrap_with_stock_accelerate() -> float:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = PlainNet()
    whole = sum(p.nbytes for p in model.parameters())
    prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    held = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in prepared.parameters())
    return held / whole
