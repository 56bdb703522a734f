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
from tests.distributed.steps import Checkpoint, by_strategy, every_rank, full_gradients

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


def test_whole_gradients_are_unscaled_with_the_shards(pool: RankPool, checkpoint: Checkpoint) -> None:
    pool.run(unscale_whole, checkpoint("qwen3_untied"), ranks=2)


def unscale_whole(directory: str) -> None:
    plain, scaled = (with_whole(directory, "native_fsdp") for _ in range(2))
    plain.forward_backward(own(batch(0)))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled._engine.gradients.scaler = scaler
    for clips in (1, 0):
        scaled.forward_backward(own(batch(0)))
        if clips:
            scaled.clip_grad_norm(1e9)
            got, wanted = gradients(scaled), gradients(plain)
            for fqn in wanted:
                torch.testing.assert_close(got[fqn], wanted[fqn])
        whole = whole_parameter(scaled)
        if clips:
            assert scaled.step()
            scaled.zero_grad()
        elif torch.distributed.get_rank() == 1:
            whole.grad[0] = float("inf")
    assert not scaled.step()  # on rank 0 too, where all are finite
    assert scaler.get_scale() == 4.0
