"""The facade: lazy wrap, training equal to a plain loop, accumulation, adapters, resume, new models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import shardwise as sw
from shardwise.materialization import clean_fqn
from shardwise.testing import RankPool
from tests.distributed.models import VOCABULARY, causal_model, from_checkpoint, gathered, same_bytes
from tests.distributed.steps import (
    STRATEGIES,
    Checkpoint,
    by_efficient,
    by_strategy,
    every_rank,
    torch_optimizer,
)

pytestmark = pytest.mark.distributed
_ROWS = 4  # of the whole job's batch; on four ranks one each
_LEARNING_RATE, _DECAY, _MOST_NORM = 1e-2, 0.1, 0.5


def facade(directory: str | None, strategy: str, **arguments: Any) -> sw.TransformersModel:
    """Return a model in full precision, with float32 shards, that never waits long."""
    common = {"mixed_precision": "no", "dtype": torch.float32, "timeout": 25.0}
    return sw.TransformersModel(directory, strategy=strategy, **{**common, **arguments})


def with_optimizer(model: sw.TransformersModel) -> sw.TransformersModel:
    """Give a model the optimizer and scheduler that `plain_losses` uses."""
    model.set_optimizer("AdamW", lr=_LEARNING_RATE, weight_decay=_DECAY)
    model.set_lr_scheduler("linear", num_warmup_steps=2, num_training_steps=8)
    return model


def batch(step: int, *, rows: int = _ROWS) -> torch.Tensor:
    """Return the whole job's tokens of a step."""
    return torch.randint(0, VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(step % 2))


def own(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return this rank's rows as inputs."""
    rows = tokens.chunk(dist.get_world_size())[dist.get_rank()]
    return {"input_ids": rows, "labels": rows}


def mean_of_ranks(loss: torch.Tensor) -> float:
    """Return the mean loss over the whole job's batch."""
    losses = every_rank(loss.item())
    return sum(losses) / len(losses)


def train(model: sw.TransformersModel, steps: range) -> list[float]:
    """Train and return the loss of each step."""
    losses = []
    for step in steps:
        outputs = model.forward_backward(own(batch(step)))
        losses.append(mean_of_ranks(outputs.loss))
        norm = model.clip_grad_and_step(max_grad_norm=_MOST_NORM)
        assert norm is not None
        assert not isinstance(norm, DTensor)
    return losses


def plain_losses(model: nn.Module, steps: range) -> list[float]:
    """Train in this process alone, as a user without shardwise would, and return the loss of each step."""
    from transformers import get_scheduler

    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    groups = [
        {"params": matrices},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=_LEARNING_RATE, weight_decay=_DECAY
    )
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=8)
    model.train()
    losses = []
    for step in steps:
        tokens = batch(step)
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MOST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return losses


def close(one: list[float], other: list[float]) -> None:
    """Fail unless losses are equal up to the order of sums."""
    assert one == pytest.approx(other, rel=2e-5), f"{one} and {other}"


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Leave out what peft 0.21 says on transformers 5.23, whose property it asks for under its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


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
    assert model.lr_scheduler.get_last_lr()[0] == pytest.approx(_LEARNING_RATE * 3 / 6)
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
        tokens = batch(step, rows=2 * _ROWS)
        whole.forward_backward(own(tokens))
        expected = whole.clip_grad_and_step(max_grad_norm=_MOST_NORM)
        first, second = tokens[:_ROWS], tokens[_ROWS:]
        halves.forward_backward(own(first))
        before = gathered(halves.model)
        assert halves.clip_grad_norm() is None
        assert halves.clip_grad_and_step(max_grad_norm=_MOST_NORM) is None
        assert not halves.step()
        halves.zero_grad()
        halves.lr_step()
        assert halves.global_step == step
        after = gathered(halves.model)
        assert all(torch.equal(before[fqn], after[fqn]) for fqn in before)
        whole_gradients = {p.grad.shape for p in halves.model.parameters() if p.grad is not None}
        assert bool(whole_gradients) == sync  # without, they wait elsewhere until they are reduced
        halves.forward_backward(own(second))
        norm = halves.clip_grad_and_step(max_grad_norm=_MOST_NORM)
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


# --- save and load ---


@by_strategy
def test_a_saved_training_goes_on_on_any_number_of_ranks(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, strategy: str
) -> None:
    directory, saved = checkpoint("qwen3_tied"), tmp_path / "saved"
    expected = pool.run(save_halfway, directory, str(saved), strategy, ranks=2)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    for ranks in (1, 2, 4):
        for losses in pool.run(go_on, directory, str(saved), strategy, ranks=ranks):
            close(losses, expected)


def save_halfway(directory: str, saved: str, name: str) -> list[float]:
    model = with_optimizer(facade(directory, name))
    train(model, range(2))
    model.forward(own(batch(0)))  # the head stays gathered
    model.save(saved)
    torch.rand(3)
    return train(model, range(2, 5))


def go_on(directory: str, saved: str, name: str) -> list[float]:
    mesh = None
    if dist.get_world_size() == 4:  # the other strategy, and two replicas of two shards
        name = "native_fsdp" if name == "accelerate" else "accelerate"
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    model = with_optimizer(facade(directory, name, device_mesh=mesh))
    model.load(saved)
    assert model.is_wrapped
    assert model.global_step == 2
    return train(model, range(2, 5))


def test_random_numbers_go_on(pool: RankPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    expected = pool.run(save_random, checkpoint("qwen3_tied"), str(tmp_path / "saved"), ranks=2)
    assert expected[0] != expected[1]
    assert pool.run(load_random, checkpoint("qwen3_tied"), str(tmp_path / "saved"), ranks=2) == expected


def draw() -> list[float]:
    import random

    import numpy as np

    return [torch.rand(()).item(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]


def save_random(directory: str, saved: str) -> list[float]:
    import random

    import numpy as np

    model = facade(directory, "native_fsdp")  # without an optimizer
    model.forward_only(own(batch(0)))
    seed = 5 + dist.get_rank()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    draw()  # keeps a Gaussian in reserve
    model.save(saved)
    return draw()


def load_random(directory: str, saved: str) -> list[float]:
    model = facade(directory, "native_fsdp")
    model.load(saved)
    return draw()


@by_strategy
def test_what_is_not_the_saved_training_is_refused(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, strategy: str
) -> None:
    directory, saved = checkpoint("qwen3_tied"), tmp_path / "saved"
    pool.run(save_halfway, directory, str(saved), strategy, ranks=2)
    pool.run(load_wrongly, directory, checkpoint("qwen3_untied"), str(saved), strategy, ranks=2)


def load_wrongly(directory: str, another: str, saved: str, name: str) -> None:
    model = facade(directory, name)
    with pytest.raises(sw.CheckpointError, match="the optimizer that it was saved with, AdamW, got None"):
        model.load(saved)
    model.set_optimizer("SGD", lr=0.1)
    with pytest.raises(sw.CheckpointError, match="saved with, AdamW, got SGD"):
        model.load(saved)
    with pytest.raises(sw.CheckpointError, match=r"written, got none with training\.pt"):
        model.load(directory)
    with pytest.raises(sw.ShardwiseError, match="expected a directory that is empty or not there"):
        model.save(saved)  # on the first rank a CheckpointError, elsewhere its echo
    other = with_optimizer(facade(another, "native_fsdp"))
    with pytest.raises(sw.CheckpointError, match="the optimizer's groups that it was saved with"):
        other.load(saved)


def test_a_damaged_file_is_named(pool: RankPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory, saved = checkpoint("qwen3_tied"), tmp_path / "saved"
    pool.run(save_halfway, directory, str(saved), "native_fsdp", ranks=2)
    file = next(saved.glob("__1_*"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    pool.run(load_damaged, directory, str(saved), ranks=2)


def load_damaged(directory: str, saved: str) -> None:
    model = with_optimizer(facade(directory, "native_fsdp"))
    with pytest.raises(sw.DamagedFileError, match="could not be read, and the model now holds parts of it"):
        model.load(saved)


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
        ({"config": {"hidden_size": 8}}, "from_config: expected a config of transformers, got dict"),
        ({"config": config, "model_cls": nn.Linear}, "from_config: expected a transformers model or auto"),
        ({"config": config, "model_cls": "Qwen33"}, "model_cls: expected a class, or the name of one in"),
        ({"config": config, "device_map": "cpu"}, "Leave device_map out"),
    ):
        with pytest.raises(sw.ConfigurationError, match=message):
            facade(None, "native_fsdp", **arguments)


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


def test_an_adapter_s_training_goes_on(pool: RankPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    directory, saved = checkpoint("qwen3_tied"), str(tmp_path / "saved")
    expected = pool.run(save_adapter_halfway, directory, saved, ranks=2)[0]
    close(pool.run(go_on_with_adapter, directory, saved, ranks=1)[0], expected)


def with_adapter(directory: str) -> sw.TransformersModel:
    """Return a model with an adapter beside a tied embedding, and a trainable copy of a norm."""
    from peft import LoraConfig

    model = facade(directory, "accelerate")
    config = LoraConfig(target_modules=["q_proj"], r=3, modules_to_save=["norm"])
    with quiet_peft():
        model.add_adapter_to_model("mine", config)
    return with_optimizer(model)


def save_adapter_halfway(directory: str, saved: str) -> list[float]:
    torch.manual_seed(1)
    model = with_adapter(directory)
    train(model, range(2))
    model.save(saved)
    return train(model, range(2, 5))


def go_on_with_adapter(directory: str, saved: str) -> list[float]:
    torch.manual_seed(2)  # what it starts from does not count
    model = with_adapter(directory)
    model.load(saved)
    return train(model, range(2, 5))


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
