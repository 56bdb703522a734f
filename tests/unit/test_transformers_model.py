"""The facade's parts: decay groups, schedulers, counting of passes, the step with a gradient scaler, random numbers."""

from __future__ import annotations

import importlib.util
import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardwise as sw
from shardwise.strategies.precision import check_grad_scaler
from shardwise.transformers_model.accumulation import Accumulation
from shardwise.transformers_model.adapters import put_adapter
from shardwise.transformers_model.arguments import make_strategy
from shardwise.transformers_model.engines import AccelerateEngine, TorchEngine
from shardwise.transformers_model.optimization import decaying_names, make_optimizer, make_scheduler
from shardwise.transformers_model.random_state import random_state, set_random_state


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.ln_1 = nn.LayerNorm(4)
        self.q_norm = nn.Linear(4, 4, bias=False)  # a norm by its name
        self.scale = nn.Parameter(torch.ones(4))  # neither, but of one dim
        self.table = nn.Parameter(torch.ones(2, 4))


# --- decay groups ---


def test_only_matrices_that_are_no_norm_decay() -> None:
    assert decaying_names(Layer()) == {"linear.weight", "table"}


def test_without_accelerate_the_number_of_dims_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert decaying_names(Layer()) == {"linear.weight", "q_norm.weight", "table"}
    with pytest.raises(sw.MissingDependencyError, match="add_adapter_to_model needs peft"):
        put_adapter(None, Layer(), "mine", "directory", is_trainable=True, autocast_adapter_dtype=True)  # type: ignore[arg-type]


def test_frozen_parameters_are_in_no_group() -> None:
    model = Layer()
    model.linear.requires_grad_(False)
    optimizer = make_optimizer(model, "AdamW", {"lr": 0.1, "weight_decay": 0.5})
    names = {id(p): name for name, p in model.named_parameters()}
    assert [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] == [
        ["table"],
        ["scale", "ln_1.weight", "ln_1.bias", "q_norm.weight"],
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    model.table.requires_grad_(False)
    assert len(make_optimizer(model, "AdamW", {}).param_groups) == 1  # none that is empty
    model.requires_grad_(False)
    with pytest.raises(sw.OptimizerError, match="expected trainable parameters in Layer, got none"):
        make_optimizer(model, "AdamW", {})


def test_an_optimizer_without_weight_decay_has_one_group() -> None:
    optimizer = make_optimizer(Layer(), torch.optim.LBFGS, {"lr": 0.1})
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == 7


def test_a_function_makes_the_optimizer() -> None:
    optimizer = make_optimizer(Layer(), partial(torch.optim.SGD, momentum=0.5), {"lr": 0.1})
    assert optimizer.defaults["momentum"] == 0.5
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("name", ["Adamw", "Optimizer2", "lr_scheduler", 3])
def test_an_unknown_optimizer_is_refused(name: Any) -> None:
    with pytest.raises(sw.ConfigurationError, match="optimizer_cls: expected a class"):
        make_optimizer(Layer(), name, {})


# --- schedulers ---


def test_schedulers_by_every_kind_of_name() -> None:
    optimizer = make_optimizer(Layer(), "SGD", {"lr": 1.0})
    cosine = make_scheduler(optimizer, "cosine", {"num_warmup_steps": 4, "num_training_steps": 8})
    assert cosine.get_last_lr() == [0.0, 0.0]
    step = make_scheduler(optimizer, "StepLR", {"step_size": 3})
    assert type(step) is torch.optim.lr_scheduler.StepLR
    by_class = make_scheduler(optimizer, torch.optim.lr_scheduler.LambdaLR, {"lr_lambda": lambda _: 0.5})
    assert type(by_class) is torch.optim.lr_scheduler.LambdaLR


def test_what_is_not_a_scheduler_is_refused() -> None:
    optimizer = make_optimizer(Layer(), "SGD", {"lr": 1.0})
    with pytest.raises(sw.ConfigurationError, match=r"one of linear, cosine.*StepLR.*got 'cosin'"):
        make_scheduler(optimizer, "cosin", {})
    with pytest.raises(sw.ConfigurationError, match="steps by a metric"):
        make_scheduler(optimizer, "ReduceLROnPlateau", {})


# --- counting of passes ---


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "2"])
def test_the_number_of_passes_is_checked(steps: Any) -> None:
    with pytest.raises(sw.ConfigurationError, match="expected an int of at least 1"):
        Accumulation(steps, sync_each_batch=True)
    with pytest.raises(sw.ConfigurationError, match="expected an int of at least 1"):
        Accumulation(1, sync_each_batch=True).is_complete(steps)


def test_gradients_are_averaged_once() -> None:
    accumulation = Accumulation(3, sync_each_batch=True)
    model = Layer()
    weight = model.table

    def run_pass(value: float) -> None:
        accumulation.begin_pass(model, [weight])
        weight.grad = torch.full((2, 4), value) + (0 if weight.grad is None else weight.grad)
        accumulation.end_pass()

    for _ in range(3):
        assert not accumulation.is_complete(None)
        run_pass(2.0)
    assert accumulation.is_complete(None)
    assert not accumulation.is_complete(2)
    for _ in range(2):
        accumulation.finish(model)
        assert weight.grad.eq(2.0).all()
    run_pass(6.0)  # after a look at the average, which is of all four now
    accumulation.finish(model)
    assert weight.grad.eq(3.0).all()
    accumulation.restart()
    assert not accumulation.is_complete(1)


# --- the step with a gradient scaler ---


def scaled(kind: str) -> tuple[Any, Any, nn.Linear]:
    """Return an engine with a scaler, an optimizer as it takes it, and the model of one weight."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    mesh = SimpleNamespace(size=lambda: 1)
    return TorchEngine(SimpleNamespace(scaler=scaler, device_mesh=mesh)), optimizer, model  # type: ignore[arg-type]


def test_scaled_gradients_are_clipped_and_stepped_unscaled() -> None:
    engine, optimizer, model = scaled("torch")
    engine.backward(model(torch.tensor([[3.0]])).sum())
    assert model.weight.grad.item() == 24.0
    norm = engine.clip(list(model.parameters()), optimizer, max_norm=0.5, norm_type=2.0)
    assert norm.item() == pytest.approx(3.0)
    assert engine.step(optimizer)
    assert model.weight.item() == pytest.approx(0.5, rel=1e-5)


def test_scaled_gradients_are_unscaled_once_and_only_before_a_step() -> None:
    engine, optimizer, model = scaled("torch")
    parameters = list(model.parameters())
    engine.backward(model(torch.tensor([[3.0]])).sum())
    for _ in range(2):
        assert engine.clip(parameters, optimizer, max_norm=100.0, norm_type=2.0).item() == 3.0
    engine.gradients.scale_again(parameters)  # a further pass, at the scaler's scale
    engine.backward(model(torch.tensor([[2.0]])).sum())
    assert engine.clip(parameters, optimizer, max_norm=100.0, norm_type=2.0).item() == 5.0
    optimizer.zero_grad()
    engine.gradients.restart()
    engine.backward(model(torch.tensor([[2.0]])).sum())
    assert engine.clip(parameters, optimizer, max_norm=100.0, norm_type=2.0).item() == 2.0
    assert engine.step(optimizer)
    assert model.weight.item() == -1.0


def test_gradients_that_are_not_finite_skip_the_step() -> None:
    engine, optimizer, model = scaled("torch")
    engine.backward(model(torch.tensor([[float("inf")]])).sum())
    assert not engine.step(optimizer)
    assert model.weight.item() == 1.0
    optimizer.zero_grad()
    engine.backward(model(torch.tensor([[0.5]])).sum())
    assert engine.step(optimizer)
    assert model.weight.item() == 0.5


def test_an_accelerator_of_several_passes_does_not_divide_the_loss() -> None:
    class Divides:
        scaler = None
        gradient_accumulation_steps = 4

        def backward(self, loss: torch.Tensor) -> None:
            (loss / 4).backward()

    weight = nn.Parameter(torch.ones(()))
    engine = AccelerateEngine(SimpleNamespace(accelerator=Divides(), device_mesh=None))  # type: ignore[arg-type]
    engine.backward(weight * 3)
    assert weight.grad.item() == 3.0


def test_options_of_a_scaler_are_for_fp16() -> None:
    check_grad_scaler(None, mixed_precision="bf16")
    check_grad_scaler({"init_scale": 2.0, "growth_interval": 5}, mixed_precision="fp16")
    with pytest.raises(sw.ConfigurationError, match="expected mixed_precision='fp16', got 'bf16'"):
        check_grad_scaler({"init_scale": 2.0}, mixed_precision="bf16")
    with pytest.raises(sw.ConfigurationError, match=r"unknown keys scale\. Known keys: init_scale, growth"):
        check_grad_scaler({"scale": 2.0}, mixed_precision="fp16")


# --- arguments ---


def test_a_strategy_is_made_by_its_name() -> None:
    with pytest.raises(sw.ConfigurationError, match="expected one of accelerate, native_fsdp, got 'ddp'"):
        make_strategy("ddp", ddp_config=None)
    with pytest.raises(sw.ConfigurationError, match="native_fsdp' has no DistributedDataParallel"):
        make_strategy("native_fsdp", ddp_config={})


# --- random numbers ---


def draw() -> list[float]:
    return [torch.rand(()).item(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]


@pytest.mark.parametrize("drawn", [0, 1], ids=["no reserve", "a Gaussian in reserve"])
def test_random_numbers_come_back(drawn: int) -> None:
    for _ in range(drawn):
        draw()
    state = random_state("cpu")
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    expected = draw()
    draw()
    set_random_state(state, "cpu")
    assert draw() == expected
    set_random_state({}, "cpu")  # a rank that the saving job did not have
