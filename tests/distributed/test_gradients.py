"""Gradients of the facade between backward and step: whole ones beside shards, several passes, a scaler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shardwise as sw
from shardwise.materialization import clean_fqn
from shardwise.testing import RankPool
from tests.distributed.facade import batch, facade, own
from tests.distributed.models import from_checkpoint
from tests.distributed.steps import (
    Checkpoint,
    backward,
    by_strategy,
    every_rank,
    full_gradients,
    load,
    make_strategy,
)

pytestmark = pytest.mark.distributed

WHOLE = "model.norm.weight"  # not sharded; each rank has its own gradient of it


def with_whole(directory: str, name: str) -> sw.TransformersModel:
    model = facade(directory, name, fsdp_config={"ignored_params": [WHOLE]})
    model.set_optimizer("SGD", lr=0.1)
    return model


def gradients(model: sw.TransformersModel) -> dict[str, torch.Tensor]:
    return {fqn: gradient.clone() for fqn, gradient in full_gradients(model.model).items()}


def whole_parameter(model: sw.TransformersModel) -> torch.Tensor:
    return next(p for fqn, p in model.model.named_parameters() if clean_fqn(fqn) == WHOLE)


# --- whole gradients beside shards ---


@by_strategy
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_whole_gradients_clip_all_ranks_alike(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, norm_type: float
) -> None:
    pool.run(clip_whole, checkpoint("qwen3_untied"), strategy, norm_type, ranks=2)


def clip_whole(directory: str, name: str, norm_type: float) -> None:
    model = with_whole(directory, name)
    model.forward_backward(own(batch(0)))
    whole = whole_parameter(model)
    torch.distributed.all_reduce(whole.grad, op=torch.distributed.ReduceOp.SUM)
    whole.grad.mul_(
        100 * (1 + torch.distributed.get_rank())
    )  # rank 1's is twice rank 0's, and the greatest of all
    before = gradients(model)
    norm = model.clip_grad_norm(0.5, norm_type)
    after = gradients(model)
    norms = every_rank(norm.item())
    assert norms[0] == norms[1]
    factors = {fqn: (after[fqn] / before[fqn]).nan_to_num(0.0).abs() for fqn in before}
    for fqn, factor in factors.items():
        kept = factor[factor > 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 0.5 / norms[0]), rtol=1e-4, atol=0, msg=fqn)


@by_strategy
def test_equal_whole_gradients_count_once(pool: RankPool, checkpoint: Checkpoint, strategy: str) -> None:
    pool.run(clip_equal, checkpoint("qwen3_untied"), strategy, ranks=2)


def clip_equal(directory: str, name: str) -> None:
    tokens = batch(0)
    expected = from_checkpoint(directory, dtype=torch.float32)
    expected(input_ids=tokens, labels=tokens).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
    model = with_whole(directory, name)
    model.forward_backward(own(tokens))
    gradient: Any = whole_parameter(model).grad
    torch.distributed.all_reduce(gradient)
    gradient.div_(2)
    torch.testing.assert_close(model.clip_grad_norm(0.5), norm, rtol=1e-4, atol=1e-6)


@by_strategy
def test_whole_gradients_are_unscaled_with_the_shards(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    pool.run(unscale_whole, checkpoint("qwen3_untied"), strategy, ranks=2)


def give_scaler(model: sw.TransformersModel) -> torch.amp.GradScaler:
    """Scale a model's gradients on the CPU, where no strategy does."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model._engine.gradients.scaler = scaler
    if isinstance(model.strategy, sw.AccelerateStrategy):
        from accelerate.optimizer import AcceleratedOptimizer

        model.strategy.accelerator.scaler = scaler
        model.forward_only(own(batch(0)))  # wraps
        model.optimizer = AcceleratedOptimizer(model._torch_optimizer, device_placement=False, scaler=scaler)
    return scaler


def unscale_whole(directory: str, name: str) -> None:
    plain, scaled = with_whole(directory, "native_fsdp"), with_whole(directory, name)
    plain.forward_backward(own(batch(0)))
    scaler = give_scaler(scaled)
    for clips in (1, 0):
        scaled.forward_backward(own(batch(0)))
        if clips:
            scaled.clip_grad_norm(1e9)
            got, wanted = gradients(scaled), gradients(plain)
            for fqn in wanted:
                torch.testing.assert_close(got[fqn], wanted[fqn])
        whole = whole_parameter(scaled)
        if clips:
            assert scaled.clip_grad_and_step(1e9) is not None  # unscaled already
            assert scaled.global_step == 1
        elif torch.distributed.get_rank() == 1:
            whole.grad[0] = float("inf")
    assert not scaled.step()  # on rank 0 too, where all are finite
    assert scaler.get_scale() == 4.0


# --- several passes ---


@by_strategy
def test_a_look_at_the_norm_in_each_pass_changes_nothing(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    pool.run(look_at_norms, checkpoint("qwen3_untied"), strategy, ranks=2)


def look_at_norms(directory: str, name: str) -> None:
    norms = []
    for looks in (False, True):
        model = facade(directory, name, gradient_accumulation_steps=3)
        model.set_optimizer("SGD", lr=0.1)
        for step in range(6):
            model.forward_backward(own(batch(step)))
            if looks:
                assert model.clip_grad_norm(1e9, gradient_accumulation_steps=1) is not None
            norm = model.clip_grad_and_step(1e9)
        assert model.global_step == 2
        norms.append(norm)
    torch.testing.assert_close(norms[1], norms[0])


@by_strategy
def test_steps_of_the_user_s_own_are_counted(pool: RankPool, checkpoint: Checkpoint, strategy: str) -> None:
    pool.run(step_oneself, checkpoint("qwen3_untied"), strategy, ranks=2)


def step_oneself(directory: str, name: str) -> None:
    norms = []
    for own_steps in (False, True):
        model = facade(directory, name)
        model.set_optimizer("SGD", lr=0.1)
        model.set_lr_scheduler("linear", num_warmup_steps=0, num_training_steps=8)
        for step in range(2):
            model.forward_backward(own(batch(step)))
            if own_steps:
                model.optimizer.step()
                model.optimizer.zero_grad()
                model.lr_step()
            else:
                model.clip_grad_and_step(max_grad_norm=None)
        assert model.global_step == 2
        assert model.lr_scheduler.get_last_lr() == [0.1 * 6 / 8] * 2
        model.forward_backward(own(batch(0)))
        norms.append(model.clip_grad_norm(1e9))
    torch.testing.assert_close(norms[1], norms[0])


@by_strategy
@pytest.mark.parametrize("precision", ["no", "bf16"])  # reduced in another dtype, gradients wait elsewhere
def test_a_short_group_without_sync_is_a_step(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, precision: str
) -> None:
    pool.run(step_short, checkpoint("qwen3_untied"), strategy, precision, ranks=2)


def step_short(directory: str, name: str, precision: str) -> None:
    norms = []
    for sync in (True, False):
        model = facade(
            directory, name, mixed_precision=precision, gradient_accumulation_steps=3, sync_each_batch=sync
        )
        model.set_optimizer("SGD", lr=0.1)
        for step in range(2):
            model.forward_backward(own(batch(step)))
        assert model.step() is False
        norms.append([model.clip_grad_and_step(1e9, gradient_accumulation_steps=2)])
        assert model.global_step == 1
        for passes in (1, 2):
            for step in range(2):
                model.forward_backward(own(batch(step)))
            model.zero_grad(passes)
        model.forward_backward(own(batch(0)))
        norms[-1].append(model.clip_grad_norm(1e9, gradient_accumulation_steps=1))
        assert model.step(1)
        model.zero_grad()
        for step in range(3):
            model.forward_backward(own(batch(step)))
        norms[-1].append(model.clip_grad_and_step(1e9))
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-4 if precision == "no" else 2e-2, atol=1e-6)


# --- parts that a rank has not run ---


@by_strategy
def test_ranks_may_reach_different_experts(pool: RankPool, checkpoint: Checkpoint, strategy: str) -> None:
    pool.run(reach_experts, checkpoint("qwen3_moe"), strategy, ranks=2)


def reach_experts(directory: str, name: str) -> None:
    strategy = make_strategy(name)
    model = strategy.wrap_model(load(strategy, directory, defer=True, dtype=torch.float32))
    expected = from_checkpoint(directory, dtype=torch.float32)
    tokens = [token for token in range(3, 97) if experts_of(expected, token) != experts_of(expected, 2)]
    pair = [2, tokens[0]]
    for token in pair:
        (expected(input_ids=torch.tensor([[token]])).logits.square().mean() / 2).backward()
    loss = model(input_ids=torch.tensor([[pair[torch.distributed.get_rank()]]])).logits.square().mean()
    backward(strategy, loss)
    got = full_gradients(model)
    for fqn, gradient in full_gradients(expected).items():
        torch.testing.assert_close(got[fqn], gradient, rtol=1e-4, atol=1e-6)


def experts_of(model: Any, token: int) -> Any:
    """Return which experts a token reaches, in all layers."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[token]]), output_router_logits=True).router_logits
    return [each.topk(2).indices.sort().values.tolist() for each in logits]
