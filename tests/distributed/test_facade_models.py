"""What the facade trains besides a pretrained model: new ones from a config, and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.facade import (
    batch,
    close,
    facade,
    mean_of_ranks,
    own,
    quiet_peft,
    train,
    with_optimizer,
)
from tests.distributed.models import causal_model, from_checkpoint, gathered, same_bytes
from tests.distributed.steps import (
    STRATEGIES,
    Checkpoint,
    by_efficient,
    by_strategy,
)

pytestmark = pytest.mark.distributed


# --- new models ---


@pytest.mark.parametrize("kind", ["qwen3_tied", "gpt2"])
def test_a_new_model_is_the_same_on_any_number_of_ranks(pool: RankPool, kind: str) -> None:
    made = []
    for ranks in (1, 2):
        for strategy in STRATEGIES:
            made += [
                pool.run(make_new, kind, strategy, efficient, ranks=ranks)[0] for efficient in (True, False)
            ]
    for other in made[1:]:
        assert list(other) == list(made[0])
        assert all(same_bytes(other[fqn], value) for fqn, value in made[0].items())


def make_new(kind: str, name: str, efficient: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(3 + 100 * dist.get_rank())  # rank 0's counts
    plain = causal_model(kind)
    torch.manual_seed(3 + 100 * dist.get_rank())
    model = facade(None, name, config=plain.config, memory_efficient_init=efficient)
    model.forward(own(batch(0)))
    tensors = gathered(model.model)
    assert set(model.last_report.origins.values()) <= {"initialised", "tied", "recomputed", "kept"}
    for fqn, parameter in plain.named_parameters():
        got = tensors[fqn]
        assert got.shape == parameter.shape
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.std(), parameter.std(), rtol=0.25, atol=1e-3)
    return tensors


def test_a_config_can_be_changed(pool: RankPool) -> None:
    pool.run(change_config, ranks=2)


def change_config() -> None:
    config = causal_model("qwen3_tied").config
    model = facade(
        None, "native_fsdp", model_cls="Qwen3ForCausalLM", config=config, num_hidden_layers=1, dtype="auto"
    )
    model.forward(own(batch(0)))
    assert len(model.model.model.layers) == 1
    assert config.num_hidden_layers == 2  # the caller's stays
    with pytest.raises(sw.ConfigurationError, match=r"expected model_id= .* or config=, got neither"):
        facade(None, "native_fsdp")


def test_ranks_that_build_different_models_are_told(pool: RankPool) -> None:
    pool.run(build_differently, ranks=2)


def build_differently() -> None:
    config = causal_model("qwen3_tied").config
    with pytest.raises(sw.RankMismatchError, match="Pass the same class, config and dtype on every rank"):
        facade(None, "native_fsdp", config=config, num_hidden_layers=1 + dist.get_rank())
    for arguments, message in (
        ({"config": {"hidden_size": 8}}, "or the directory or hub id of one, got dict"),
        ({"config": config, "model_cls": nn.Linear}, "from_config: expected a transformers model or auto"),
        ({"config": config, "model_cls": "Qwen33"}, "model_cls: expected a class, or the name of one in"),
        ({"config": config, "device_map": "cpu"}, "Leave device_map out"),
    ):
        with pytest.raises(sw.ConfigurationError, match=message):
            facade(None, "native_fsdp", **arguments)


@pytest.mark.parametrize("argument", ["config", "model_cls"])
def test_an_argument_that_one_rank_cannot_read_is_told_to_all(
    pool: RankPool, checkpoint: Checkpoint, argument: str
) -> None:
    pool.run(read_on_one_rank, checkpoint("qwen3_tied"), argument, ranks=2)


def read_on_one_rank(directory: str, argument: str) -> None:
    right, wrong = {"config": (directory, directory + "x"), "model_cls": ("AutoModelForCausalLM", "Auto")}[
        argument
    ]
    is_first = dist.get_rank() == 0
    with pytest.raises(sw.PeerError if is_first else (OSError, sw.ConfigurationError)):
        facade(directory, "native_fsdp", **{argument: right if is_first else wrong})


# --- adapters ---


@by_strategy
@by_efficient
def test_only_a_new_adapter_trains(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, efficient: bool
) -> None:
    pytest.importorskip("peft")
    answers = [
        pool.run(train_adapter, checkpoint("qwen3_untied"), strategy, efficient, ranks=ranks)[0]
        for ranks in (1, 2)
    ]
    close(*answers)


def train_adapter(directory: str, name: str, efficient: bool) -> list[float]:
    from peft import LoraConfig

    torch.manual_seed(11 + dist.get_rank())
    # On one rank with gradient checkpointing, so that the losses say that it changes nothing.
    model = facade(
        directory,
        name,
        memory_efficient_init=efficient,
        gradient_checkpointing=dist.get_world_size() == 1,
    )
    with quiet_peft():
        model.add_adapter_to_model("mine", LoraConfig(target_modules=["q_proj", "v_proj"], r=3))
    assert not model.is_wrapped
    with_optimizer(model)
    model.forward_only(own(batch(0)))
    before = gathered(model.model)
    losses = train(model, range(3))
    after = gathered(model.model)
    changed = {fqn for fqn in before if not torch.equal(before[fqn], after[fqn])}
    assert changed == {fqn for fqn in before if ".mine." in fqn}
    assert len(changed) == 8  # two layers, two modules, A and B
    assert all(value.eq(0).all() for fqn, value in before.items() if ".lora_B." in fqn)
    return losses


@by_strategy
@by_efficient
def test_a_saved_adapter_is_read(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, strategy: str, efficient: bool
) -> None:
    peft = pytest.importorskip("peft")
    directory = checkpoint("qwen3_untied")
    torch.manual_seed(0)
    with quiet_peft():
        saved = peft.get_peft_model(
            from_checkpoint(directory, dtype=torch.float32),
            peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False),
        )
    saved.save_pretrained(tmp_path)
    tokens = batch(0)
    expected = saved.eval()(input_ids=tokens, labels=tokens).loss.item()
    for losses in pool.run(use_adapter, directory, str(tmp_path), strategy, efficient, ranks=2):
        close(losses, [expected])


def use_adapter(directory: str, adapter: str, name: str, efficient: bool) -> list[float]:
    model = facade(directory, name, memory_efficient_init=efficient)
    with quiet_peft():
        model.add_adapter_to_model("mine", adapter)
    return [mean_of_ranks(model.forward_only(own(batch(0))).loss)]


@by_strategy
def test_an_adapter_may_start_from_the_base_s_values(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    peft = pytest.importorskip("peft")
    directory = checkpoint("qwen3_untied")
    with quiet_peft():
        expected = peft.get_peft_model(from_checkpoint(directory, dtype=torch.float32), pissa())
    tensors = dict(expected.named_parameters())
    for options in ({"defer": False}, {"memory_efficient_init": False}):
        for got in pool.run(put_pissa, directory, strategy, options, ranks=2):
            for fqn, value in tensors.items():
                torch.testing.assert_close(got[fqn.replace(".default.", ".mine.")], value.detach())
    pool.run(refuse_pissa, directory, strategy, ranks=2)


def pissa() -> Any:
    from peft import LoraConfig

    return LoraConfig(target_modules=["q_proj"], r=3, init_lora_weights="pissa")


def put_pissa(directory: str, name: str, options: dict[str, bool]) -> dict[str, torch.Tensor]:
    model = facade(directory, name, **options)
    with quiet_peft():
        model.add_adapter_to_model("mine", pissa())
    model.forward_only(own(batch(0)))
    return gathered(model.model)


def refuse_pissa(directory: str, name: str) -> None:
    model = facade(directory, name)
    with pytest.raises(sw.ConfigurationError, match=r"add_adapter: .*'pissa'.*defer=False"):
        model.add_adapter_to_model("mine", pissa())
