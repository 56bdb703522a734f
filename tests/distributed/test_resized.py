"""Embeddings that are resized between load and wrap: the checkpoint's rows stay, new ones start as the model starts them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.models import VOCABULARY, check_equal, from_checkpoint, gathered, raw_bytes, ties
from tests.distributed.steps import (
    Checkpoint,
    backward,
    by_strategy,
    language_loss,
    load,
    make_strategy,
    own_rows,
    token_batch,
)

pytestmark = pytest.mark.distributed
MORE, FEWER = 131, 60  # enough rows for the last of three ranks to have new ones alone


@pytest.mark.parametrize("kind", ["qwen3_untied", "qwen3_tied", "gpt2"])
def test_more_rows_keep_the_old_ones_and_do_not_depend_on_the_ranks(
    pool: RankPool, checkpoint: Checkpoint, kind: str
) -> None:
    digests = {
        digest
        for ranks, strategy in ((1, "native_fsdp"), (2, "accelerate"), (3, "native_fsdp"))
        for digest in pool.run(grow, strategy, checkpoint(kind), ranks=ranks)
    }
    assert len(digests) == 1


def grow(name: str, directory: str) -> str:
    torch.manual_seed(0 if dist.get_rank() == 0 else 50 + dist.get_rank())
    strategy = make_strategy(name)
    model: Any = load(strategy, directory, defer=True)
    model.resize_token_embeddings(MORE, mean_resizing=False)
    model, optimizer = strategy.wrap_model(model, torch.optim.SGD(model.parameters(), lr=0.1))
    whole, expected = gathered(model), from_checkpoint(directory)
    digest = hashlib.sha256()
    grown = {fqn for fqn, tensor in whole.items() if tensor.shape[:1] == (MORE,)}
    for fqn, tensor in dict(expected.state_dict()).items():
        if fqn not in grown:
            assert torch.equal(whole[fqn], tensor), fqn
            continue
        assert torch.equal(whole[fqn][:VOCABULARY], tensor), fqn
        new = whole[fqn][VOCABULARY:].float()
        assert new.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
        digest.update(raw_bytes(whole[fqn]).numpy())
    assert ties(model) == ties(expected)
    assert model.config.vocab_size == MORE
    origins = strategy.last_report.origins
    assert {origins[fqn] for fqn in grown} <= {"derived", "tied"}
    assert {fqn for fqn, origin in origins.items() if origin == "derived"} <= grown
    assert "initialised" not in origins.values()
    backward(strategy, language_loss(model, own_rows(token_batch())))
    optimizer.step()
    return digest.hexdigest()


@by_strategy
@pytest.mark.parametrize("kind", ["qwen3_untied", "qwen3_tied", "gpt2"])
def test_fewer_rows_are_those_of_the_checkpoint(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, kind: str
) -> None:
    pool.run(shrink, strategy, checkpoint(kind), ranks=2)


def shrink(name: str, directory: str) -> None:
    strategy = make_strategy(name)
    model, expected = (load(strategy, directory, defer=True), from_checkpoint(directory))
    for each in (model, expected):
        each.resize_token_embeddings(FEWER, mean_resizing=False)  # type: ignore[operator]
    strategy.wrap_model(model)
    check_equal(model, expected)
    assert "derived" not in strategy.last_report.origins.values()


def test_a_resized_model_with_trainable_copies(pool: RankPool, checkpoint: Checkpoint) -> None:
    pytest.importorskip("peft")
    pool.run(grow_and_adapt, checkpoint("qwen3_untied"), ranks=2)


def grow_and_adapt(directory: str) -> None:
    from peft import LoraConfig, get_peft_model

    strategy = make_strategy("native_fsdp")
    base: Any = load(strategy, directory, defer=True)
    base.resize_token_embeddings(MORE, mean_resizing=False)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
    strategy.wrap_model(model)
    whole, expected = gathered(model), from_checkpoint(directory).state_dict()
    inside = "base_model.model."
    for name in ("model.embed_tokens", "lm_head"):
        original = whole[f"{inside}{name}.original_module.weight"]
        assert torch.equal(original[:VOCABULARY], expected[f"{name}.weight"])
        copy = whole[f"{inside}{name}.modules_to_save.default.weight"]
        assert torch.equal(copy[:VOCABULARY], expected[f"{name}.weight"])
        assert copy[VOCABULARY:].float().std().item() == pytest.approx(0.02, rel=0.1)


def test_a_mean_of_rows_that_are_not_there_is_refused_with_the_remedy(
    pool: RankPool, checkpoint: Checkpoint
) -> None:
    for error in pool.run_to_errors(grow_by_mean, checkpoint("qwen3_untied"), True, ranks=2):
        assert isinstance(error, sw.ConfigurationError), error
        assert "mean_resizing=False" in str(error)
        assert "load_pretrained(defer=False)" in str(error)


@pytest.mark.parametrize("kind", ["qwen3_untied", "qwen3_tied"])
def test_the_first_rank_takes_the_mean_of_its_values(
    pool: RankPool, checkpoint: Checkpoint, kind: str
) -> None:
    pool.run(grow_by_mean, checkpoint(kind), False, ranks=2)


def grow_by_mean(directory: str, defer: bool) -> None:
    strategy = make_strategy("native_fsdp")
    model = load(strategy, directory, defer=defer, dtype=torch.float32)
    expected = from_checkpoint(directory, dtype=torch.float32)
    for each in (model, expected):
        torch.manual_seed(4)
        each.resize_token_embeddings(MORE)  # type: ignore[operator]
    strategy.wrap_model(model)
    check_equal(model, expected)
    assert not any("_with_mean" in name for module in model.modules() for name in vars(module))


def test_other_columns_are_refused_by_name(pool: RankPool, checkpoint: Checkpoint) -> None:
    for error in pool.run_to_errors(widen, checkpoint("qwen3_untied"), ranks=2):
        assert isinstance(error, sw.ShapeMismatchError), error
        assert "layers.0.mlp.up_proj.weight" in str(error)
        assert "defer=False" in str(error)


def widen(directory: str) -> None:
    strategy = make_strategy("native_fsdp")
    model: Any = load(strategy, directory, defer=True)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = torch.empty(40, 33, device="meta", dtype=weight.dtype)
    strategy.wrap_model(model)


# --- trainable copies of what was resized ---


@pytest.mark.parametrize("kind", ["qwen3_untied", "qwen3_tied"])
@pytest.mark.parametrize("copied", [("lm_head",), ("embed_tokens", "lm_head")], ids="+".join)
def test_a_trainable_copy_has_the_new_rows_of_its_original(
    pool: RankPool, checkpoint: Checkpoint, kind: str, copied: tuple[str, ...]
) -> None:
    pytest.importorskip("peft")
    pool.run(copy_grown, checkpoint(kind), copied, ranks=2)


def copy_grown(directory: str, copied: tuple[str, ...]) -> None:
    from peft import LoraConfig

    strategy = make_strategy("native_fsdp")
    model: Any = load(strategy, directory, defer=True)
    model.resize_token_embeddings(MORE, mean_resizing=False)
    with quiet_peft():
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=list(copied))
        model = strategy.wrap_model(strategy.add_adapter(model, config))
    whole, stored = gathered(model), from_checkpoint(directory).state_dict()
    copies = [fqn for fqn in whole if ".modules_to_save." in fqn]
    assert copies
    heads = {}
    for fqn in copies:
        original = fqn.replace("modules_to_save.default", "original_module")
        base = fqn.replace(".modules_to_save.default", "").removeprefix("base_model.model.")
        assert torch.equal(whole[fqn][:VOCABULARY], stored[base]), fqn
        assert whole[fqn][VOCABULARY:].float().std() > 0
        assert torch.equal(whole[fqn], whole[original]), fqn
        heads[base] = whole[fqn]
    if model.config.tie_word_embeddings and len(heads) > 1:
        assert torch.equal(*heads.values())


# --- saved adapters of a resized model ---


@pytest.mark.parametrize("kind", ["qwen3_untied", "qwen3_tied"])
@pytest.mark.parametrize("copied", [(), ("lm_head",), ("embed_tokens",)], ids="+".join)
def test_an_adapter_saved_with_resized_embeddings_is_read(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, kind: str, copied: tuple[str, ...]
) -> None:
    peft = pytest.importorskip("peft")
    directory = checkpoint(kind)
    with quiet_peft():
        base: Any = from_checkpoint(directory)
        base.resize_token_embeddings(MORE, mean_resizing=False)
        config = peft.LoraConfig(
            target_modules=["q_proj"], init_lora_weights=False, modules_to_save=list(copied) or None
        )
        saved = peft.get_peft_model(base, config)
        with torch.no_grad():
            for name, parameter in saved.named_parameters():
                if ".modules_to_save." in name:
                    parameter.add_(1)
        saved.save_pretrained(tmp_path)
        pool.run(read_grown, directory, str(tmp_path), ranks=2)


def read_grown(directory: str, adapter: str) -> None:
    from peft import PeftModel

    with quiet_peft():
        expected: Any = from_checkpoint(directory)
        expected.resize_token_embeddings(MORE, mean_resizing=False)
        expected = PeftModel.from_pretrained(expected, adapter, is_trainable=True)
        strategy = make_strategy("native_fsdp")
        model: Any = load(strategy, directory, defer=True)
        model.resize_token_embeddings(MORE, mean_resizing=False)
        model = strategy.wrap_model(strategy.load_adapter(model, adapter))
    check_equal(model, expected)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Ignore what PEFT says of tied and resized embeddings, which are meant here."""
    with warnings.catch_warnings():
        for message in (
            "`is_gradient_check",
            "Model has `tie_word",
            "Setting `save_embedding",
            "Model with `tie_word",
        ):
            warnings.filterwarnings("ignore", message)
        yield
