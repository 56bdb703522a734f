"""Edits of a deferred model before the wrap are refused by name; what changes no value goes on working."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardwise.errors import LeftOnMetaError, PeerError
from shardwise.strategies.awaited import AwaitedParameter
from shardwise.testing import RankPool
from tests.distributed.models import check_equal, from_checkpoint
from tests.distributed.steps import Checkpoint, by_strategy, load, make_strategy

pytestmark = pytest.mark.distributed


def scale_data(model: Any) -> None:
    model.lm_head.weight.data.mul_(2)


def scale_part_of_data(model: Any) -> None:
    model.lm_head.weight.data[:3] = 0


def scale(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


def initialise(model: Any) -> None:
    nn.init.normal_(model.lm_head.weight)


def write_through_the_state_dict(model: Any) -> None:
    model.state_dict()["lm_head.weight"].zero_()


def cast_and_scale(model: Any) -> None:
    model.to(torch.float32)
    model.lm_head.weight.data.mul_(2)


EDITS = [
    scale_data,
    scale_part_of_data,
    scale,
    initialise,
    write_through_the_state_dict,
    cast_and_scale,
]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_refused_on_all_ranks(
    pool: RankPool, checkpoint: Checkpoint, edit: Callable[[Any], None]
) -> None:
    for message in pool.run(wrap_edited, "native_fsdp", checkpoint("qwen3_untied"), edit, [0, 1], ranks=2):
        assert "lm_head.weight: expected tensors" in message
        assert "load_pretrained(defer=False)" in message


@by_strategy
def test_an_edit_on_one_rank_is_refused_on_all(pool: RankPool, checkpoint: Checkpoint, strategy: str) -> None:
    first, second = pool.run(wrap_edited, strategy, checkpoint("qwen3_untied"), scale_data, [1], ranks=2)
    assert first.startswith("PeerError: wrap_model, phase 'check': rank 1 ")
    assert "LeftOnMetaError: lm_head.weight: expected" in first
    assert second.startswith("LeftOnMetaError: lm_head.weight: expected")


def wrap_edited(name: str, directory: str, edit: Callable[[Any], None], ranks: list[int]) -> str:
    strategy = make_strategy(name)
    model = load(strategy, directory, defer=True)
    if dist.get_rank() in ranks:
        edit(model)
    with pytest.raises((LeftOnMetaError, PeerError)) as caught:
        strategy.wrap_model(model)
    return f"{caught.type.__name__}: {caught.value}"


def test_an_edited_buffer_is_refused(pool: RankPool, checkpoint: Checkpoint) -> None:
    pool.run(wrap_with_edited_buffer, checkpoint("qwen3_untied"), ranks=2)


def wrap_with_edited_buffer(directory: str) -> None:
    strategy = make_strategy("native_fsdp")
    model: Any = load(strategy, directory, defer=True)
    frequencies = model.model.rotary_emb.inv_freq
    if not frequencies.is_meta:  # transformers 4.57 builds it with values, which are kept
        return
    frequencies.mul_(0.5)
    with pytest.raises(LeftOnMetaError, match=r"model\.rotary_emb\.inv_freq"):
        strategy.wrap_model(model)


@by_strategy
def test_what_changes_no_value_goes_on_working(pool: RankPool, checkpoint: Checkpoint, strategy: str) -> None:
    pool.run(wrap_unedited, strategy, checkpoint("qwen3_tied"), ranks=2)


def wrap_unedited(name: str, directory: str) -> None:
    strategy = make_strategy(name)
    model: Any = load(strategy, directory, defer=True)
    model.tie_weights()
    model.resize_token_embeddings(model.config.vocab_size, mean_resizing=False)
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    model.requires_grad_(False).requires_grad_(True)
    model.train()
    model.float()
    assert model.lm_head.weight.data.is_meta
    assert not model.lm_head.weight.data.requires_grad
    check_equal(strategy.wrap_model(model), from_checkpoint(directory, dtype=torch.float32))
    assert AwaitedParameter not in {type(p) for p in model.parameters()}


def test_adapters_go_on_working(pool: RankPool, checkpoint: Checkpoint) -> None:
    pytest.importorskip("peft")
    pool.run(wrap_with_adapters, checkpoint("qwen3_untied"), ranks=2)


def wrap_with_adapters(directory: str) -> None:
    from peft import LoraConfig, get_peft_model

    strategy = make_strategy("native_fsdp")
    base = load(strategy, directory, defer=True)
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a property under its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    strategy.wrap_model(model)
    assert AwaitedParameter not in {type(p) for p in model.parameters()}


def test_a_model_on_the_source_rank_may_be_edited(pool: RankPool, checkpoint: Checkpoint) -> None:
    pool.run(wrap_edited_on_source, checkpoint("qwen3_untied"), ranks=2)


def wrap_edited_on_source(directory: str) -> None:
    strategy = make_strategy("native_fsdp")
    model: Any = load(strategy, directory, defer=False)
    expected: Any = from_checkpoint(directory)
    scale_data(model)
    scale_data(expected)
    check_equal(strategy.wrap_model(model), expected)


# --- what would give storage without values, or compute from values that are not there ---


def test_a_deferred_model_stays_on_meta(pool: RankPool, checkpoint: Checkpoint) -> None:
    pool.run(move_before_the_wrap, checkpoint("qwen3_untied"), ranks=1)


def move_before_the_wrap(directory: str) -> None:
    strategy = make_strategy("native_fsdp")
    model: Any = load(strategy, directory, defer=True)
    moves: list[Callable[[], Any]] = [
        lambda: model.to("cpu"),
        lambda: model.to("cpu", torch.float32),
        model.cpu,
        lambda: model.to_empty(device="cpu"),  # what torch itself recommends where .to fails
        lambda: model.lm_head.to_empty(device="cpu"),
    ]
    for move in moves:
        with pytest.raises(
            LeftOnMetaError, match=r"stay on meta until wrap_model.*load_pretrained\(defer=False\)"
        ):
            move()
    check_equal(strategy.wrap_model(model), from_checkpoint(directory))
    model.to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_start_from_the_values_of_the_base_is_refused_by_name(
    pool: RankPool, checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    pytest.importorskip("peft")
    pool.run(start_from_values, checkpoint("qwen3_untied"), dtype, ranks=1)


def start_from_values(directory: str, dtype: torch.dtype) -> None:
    from peft import LoraConfig, get_peft_model

    strategy = make_strategy("native_fsdp")
    for start in ("pissa", "pissa_niter_2", "olora"):
        base = load(strategy, directory, defer=True, dtype=dtype)
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=start)  # type: ignore[arg-type]
        with pytest.raises(
            LeftOnMetaError, match=r"PiSSA.*load_pretrained\(defer=False\).*strategy\.add_adapter"
        ):
            get_peft_model(base, config)
