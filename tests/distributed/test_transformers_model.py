"""The facade: lazy wrap, training equal to a plain loop, groups, accumulation, the order of calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import shardwise as sw
from shardwise.materialization import clean_fqn
from shardwise.testing import RankPool
from tests.distributed.facade import (
    LEARNING_RATE,
    MOST_NORM,
    ROWS,
    batch,
    close,
    facade,
    mean_of_ranks,
    own,
    plain_losses,
    train,
    with_optimizer,
)
from tests.distributed.models import from_checkpoint, gathered
from tests.distributed.steps import (
    Checkpoint,
    by_efficient,
    by_strategy,
    torch_optimizer,
)

pytestmark = pytest.mark.distributed


# --- lazy wrap ---


@by_strategy
@pytest.mark.parametrize("efficient", [None, True, False])
def test_the_first_forward_wraps(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, efficient: bool | None
) -> None:
    pool.run(wrap_lazily, checkpoint("qwen3_tied"), strategy, efficient, ranks=2)


def wrap_lazily(directory: str, name: str, efficient: bool | None) -> None:
    model = facade(directory, name, memory_efficient_init=efficient)
    assert model.strategy.name == name
    assert model.strategy.memory_efficient_init is (efficient is not False)
    wrapped = []
    wrap_model = model.strategy.wrap_model

    def wrap_and_note(inner: nn.Module, *objects: Any) -> Any:
        wrapped.append((inner, *objects))
        return wrap_model(inner, *objects)

    model.strategy.wrap_model = wrap_and_note  # type: ignore[method-assign]
    before = model.model
    optimizer = with_optimizer(model).optimizer
    on_meta = {p.is_meta for p in before.parameters()}
    assert on_meta == {efficient is not False}  # nothing was read, or everything on every rank
    assert (wrapped, model.is_wrapped, model.last_report) == ([], False, None)
    modes = []
    before.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    model.forward_only(own(batch(0)))
    assert wrapped == [(before, optimizer)]
    assert model.is_wrapped
    assert model.last_report.strategy == name
    assert all(isinstance(p, DTensor) for p in model.model.parameters())
    assert torch_optimizer(model.optimizer) is optimizer
    assert model.model.training  # forward_only leaves the mode
    model.forward(own(batch(0)))
    assert modes == [False, True]
    assert len(wrapped) == 1


@by_strategy
def test_modes_and_outputs_without_gradients(pool: RankPool, checkpoint: Checkpoint, strategy: str) -> None:
    pool.run(compare_outputs, checkpoint("qwen3_untied"), strategy, ranks=2)


def compare_outputs(directory: str, name: str) -> None:
    model = facade(directory, name)
    outputs = model.eval().forward_only(own(batch(0)))
    assert not model.model.training
    assert not outputs.loss.requires_grad
    expected = from_checkpoint(directory, dtype=torch.float32).eval()(**own(batch(0)))
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(sw.CallOrderError, match="backward: expected a loss, got none"):
        model.backward()  # forward_only left none
    assert model.train().model.training


# --- equal to a plain loop ---


@by_strategy
@by_efficient
def test_losses_equal_those_of_a_plain_loop(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, efficient: bool
) -> None:
    pool.run(compare_training, checkpoint("qwen3_tied"), strategy, efficient, ranks=2)


def compare_training(directory: str, name: str, efficient: bool) -> None:
    model = with_optimizer(facade(directory, name, memory_efficient_init=efficient))
    reference = from_checkpoint(directory, dtype=torch.float32)
    losses = train(model, range(5))
    close(losses, plain_losses(reference, range(5)))
    assert losses[4] < losses[0] - 0.05  # else equal losses say nothing
    assert model.global_step == 5
    assert model.lr_scheduler.get_last_lr()[0] == pytest.approx(LEARNING_RATE * 3 / 6)
    got = gathered(model.model)
    for fqn, parameter in reference.named_parameters():
        torch.testing.assert_close(got[fqn], parameter.detach(), rtol=1e-3, atol=1e-4)


@by_strategy
def test_float32_shards_compute_in_bf16(pool: RankPool, checkpoint: Checkpoint, strategy: str) -> None:
    pool.run(train_in_bf16, checkpoint("qwen3_tied"), strategy, ranks=2)


def train_in_bf16(directory: str, name: str) -> None:
    model = with_optimizer(facade(directory, name, mixed_precision="bf16"))
    outputs = model.forward_only(own(batch(0)))
    assert outputs.logits.dtype == torch.bfloat16
    assert model.last_report.dtypes == {
        "stored": "float32",
        "compute": "bfloat16",
        "reduce": "float32",
        "optimizer": "float32",
    }
    losses = train(model, range(5))
    assert losses[4] < losses[0] - 0.05


@by_strategy
def test_gradient_checkpointing_gives_equal_losses(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    pool.run(compare_checkpointing, checkpoint("qwen3_untied"), strategy, ranks=2)


def compare_checkpointing(directory: str, name: str) -> None:
    kept = train(with_optimizer(facade(directory, "native_fsdp")), range(2))
    model = with_optimizer(facade(directory, name, gradient_checkpointing=True))
    saved: list[int] = []
    for layer in model.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: saved.append(1))
    close(train(model, range(2)), kept)
    assert len(saved) == 2 * 2 * 2  # two layers, two steps, each once more in backward
    saved.clear()
    model.gradient_checkpointing_disable()
    model.forward_backward(own(batch(2)))
    assert len(saved) == 2


@by_efficient
def test_class_and_config_may_be_given(pool: RankPool, checkpoint: Checkpoint, efficient: bool) -> None:
    pool.run(give_class_and_config, checkpoint("qwen3_untied"), efficient, ranks=2)


def give_class_and_config(directory: str, efficient: bool) -> None:
    from transformers import AutoConfig, Qwen3Model

    config = AutoConfig.from_pretrained(directory)
    config.use_cache = False
    for given in (config, directory):
        model = facade(
            directory,
            "native_fsdp",
            model_cls="Qwen3ForCausalLM",
            config=given,
            memory_efficient_init=efficient,
        )
        assert model.model.config.use_cache is (given is directory)
        assert mean_of_ranks(model.forward(own(batch(0))).loss) > 0
    inner = facade(directory, "native_fsdp", model_cls=Qwen3Model, memory_efficient_init=efficient)
    outputs = inner.forward(input_ids=batch(0))
    with pytest.raises(sw.CallOrderError, match="its outputs have no loss"):
        inner.backward()
    inner.backward(outputs.last_hidden_state.square().mean())


# --- the optimizer's groups ---


@by_strategy
def test_biases_norms_and_one_dim_do_not_decay(pool: RankPool, checkpoint: Checkpoint, strategy: str) -> None:
    pool.run(look_at_groups, checkpoint("gpt2"), strategy, ranks=2)


def look_at_groups(directory: str, name: str) -> None:
    model = facade(directory, name)
    model.set_optimizer(torch.optim.AdamW, lr=0.5, weight_decay=0.25)
    model.forward_only(own(batch(0)))
    names = {id(p): fqn for fqn, p in model.model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in model.optimizer.param_groups]
    options = [(group["lr"], group["weight_decay"]) for group in model.optimizer.param_groups]
    assert options == [(0.5, 0.25), (0.5, 0.0)]
    plain = {fqn for fqn in names.values() if fqn.endswith(".bias") or ".ln_" in fqn}
    assert groups == [set(names.values()) - plain, plain]
    assert {"transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"} <= groups[0]


# --- gradient accumulation ---


@by_strategy
@pytest.mark.parametrize("sync", [True, False], ids=["sync", "no sync"])
def test_two_passes_equal_one_of_double_size(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, sync: bool
) -> None:
    pool.run(compare_accumulation, checkpoint("qwen3_untied"), strategy, sync, ranks=2)


def compare_accumulation(directory: str, name: str, sync: bool) -> None:
    whole = with_optimizer(facade(directory, "native_fsdp"))
    halves = with_optimizer(facade(directory, name, gradient_accumulation_steps=2, sync_each_batch=sync))
    for step in range(2):
        tokens = batch(step, rows=2 * ROWS)
        whole.forward_backward(own(tokens))
        expected = whole.clip_grad_and_step(max_grad_norm=MOST_NORM)
        first, second = tokens[:ROWS], tokens[ROWS:]
        halves.forward_backward(own(first))
        before = gathered(halves.model)
        assert halves.clip_grad_norm() is None
        assert halves.clip_grad_and_step(max_grad_norm=MOST_NORM) is None
        assert not halves.step()
        halves.zero_grad()
        halves.lr_step()
        assert halves.global_step == step
        after = gathered(halves.model)
        assert all(torch.equal(before[fqn], after[fqn]) for fqn in before)
        whole_gradients = {p.grad.shape for p in halves.model.parameters() if p.grad is not None}
        assert bool(whole_gradients) == sync  # without, they wait elsewhere until they are reduced
        halves.forward_backward(own(second))
        norm = halves.clip_grad_and_step(max_grad_norm=MOST_NORM)
        torch.testing.assert_close(norm, expected, rtol=1e-4, atol=1e-6)
        assert halves.global_step == step + 1
    assert halves.lr_scheduler.get_last_lr() == whole.lr_scheduler.get_last_lr()
    got, wanted = gathered(halves.model), gathered(whole.model)
    for fqn in wanted:
        torch.testing.assert_close(got[fqn], wanted[fqn], rtol=1e-3, atol=1e-4)


@by_strategy
def test_the_number_of_passes_may_be_said_at_the_step(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    pool.run(step_late, checkpoint("qwen3_untied"), strategy, ranks=2)


def step_late(directory: str, name: str) -> None:
    model = with_optimizer(facade(directory, name))
    norms = []
    for count in (1, 3):
        for _ in range(count):
            model.forward_backward(own(batch(0)))
            norms.append(model.clip_grad_and_step(max_grad_norm=None, gradient_accumulation_steps=count))
    assert norms == [None] * 4
    assert model.global_step == 2
    model.forward_backward(own(batch(0)))
    alone = model.clip_grad_norm(1e9)
    model.zero_grad()
    for _ in range(2):
        model.forward_backward(own(batch(0)))
    model.zero_grad(gradient_accumulation_steps=3)  # two of three: they are kept
    torch.testing.assert_close(model.clip_grad_norm(1e9, gradient_accumulation_steps=2), alone)
    model.zero_grad(gradient_accumulation_steps=1)
    model.forward_backward(own(batch(1)))
    model.step()
    model.forward(own(batch(0)))  # the head stays gathered, and the shards still have the step's gradients
    model.zero_grad()
    model.backward()
    norm = model.clip_grad_norm(1e9)
    model.zero_grad()
    model.forward_backward(own(batch(0)))
    model.forward(own(batch(1)))  # without a backward: the gradients are the shards' all the same
    torch.testing.assert_close(norm, model.clip_grad_norm(1e9))
    model.zero_grad()
    with pytest.raises(sw.CallOrderError, match="no backward was run"):
        model.step()


# --- alongside ---


def test_the_tokenizer_is_kept_alongside(pool: RankPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    import shutil

    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    bare = checkpoint("qwen3_tied")
    directory = tmp_path / "with tokenizer"
    shutil.copytree(bare, directory)
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(directory)
    pool.run(tokenize, str(directory), bare, ranks=1)


def tokenize(directory: str, bare: str) -> None:
    model = facade(directory, "native_fsdp")
    assert model.tokenizer("a b c")["input_ids"] == [0, 1, 2]
    assert model.tokenizer is model.tokenizer
    assert not model.is_wrapped
    assert facade(bare, "native_fsdp").tokenizer is None
    mine = object()
    assert facade(bare, "native_fsdp", tokenizer=mine).tokenizer is mine


# --- the order of calls ---


@by_strategy
def test_calls_out_of_order_say_what_comes_first(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, strategy: str
) -> None:
    pytest.importorskip("peft")
    pool.run(call_out_of_order, checkpoint("qwen3_untied"), str(tmp_path / "saved"), strategy, ranks=1)


def call_out_of_order(directory: str, saved: str, name: str) -> None:
    from peft import LoraConfig

    adapter = LoraConfig(target_modules=["q_proj"])
    model = facade(directory, name, gradient_accumulation_steps=2)
    for call, first in (
        (lambda: model.set_lr_scheduler("constant"), "set_lr_scheduler: .* Call set_optimizer first"),
        (model.lr_step, "lr_step: .* Call set_lr_scheduler first"),
        (model.step, "step: .* Call set_optimizer first"),
        (lambda: model.save(saved), "save: expected a wrapped model"),
        (model.backward, "backward: .* Call forward with labels="),
    ):
        with pytest.raises(sw.CallOrderError, match=first):
            call()
    model.set_optimizer("SGD", lr=0.1)
    with pytest.raises(sw.CallOrderError, match="Add adapters before set_optimizer"):
        model.add_adapter_to_model("late", adapter)
    model.set_lr_scheduler("constant")
    model.set_optimizer(lr=0.1)  # in place of the first, and of its scheduler
    assert type(model.optimizer).__name__ == "AdamW"
    assert model.lr_scheduler is None
    for call in (model.step, model.clip_grad_and_step, model.clip_grad_norm):
        with pytest.raises(sw.CallOrderError, match="no backward was run since the last step"):
            call()
    assert not model.is_wrapped
    with pytest.raises(sw.ConfigurationError, match=r"got Tensor\. Name them: forward\(input_ids="):
        model.forward_only(own(batch(0))["input_ids"])
    model.forward_backward(own(batch(0)))
    for call, first in (
        (lambda: model.add_adapter_to_model("late", adapter), "Add it before the first forward"),
        (lambda: model.set_optimizer("SGD", lr=0.1), "Set it before the first forward"),
        (lambda: model.save(saved), "Call save after step"),
        (lambda: model.load(saved), "Call load after step"),
        (model.backward, "no forward was run since the last backward"),
    ):
        with pytest.raises(sw.CallOrderError, match=first):
            call()


@by_strategy
def test_an_optimizer_may_come_after_the_first_forward(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    pool.run(optimizer_after_forward, checkpoint("qwen3_tied"), strategy, ranks=2)


def optimizer_after_forward(directory: str, name: str) -> None:
    model = facade(directory, name)
    model.forward(own(batch(0)))  # the head stays gathered
    with_optimizer(model)
    reference = from_checkpoint(directory, dtype=torch.float32)
    close(train(model, range(3)), plain_losses(reference, range(3)))
    assert {clean_fqn(fqn) for fqn, p in model.model.named_parameters() if p.requires_grad}
