"""The calls into which faults are put, beside a plain `materialize`: what each is made with, and what it must bring."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

import shardwise as sw
from tests.distributed.faults import TIMEOUT_SECONDS
from tests.distributed.models import PlainNet, TiedNet, check_equal, from_checkpoint, write_checkpoint

EVERY_RANK, FROM_FILES = "wrap_model, every rank's values", "load_pretrained"
FROM_MEMORY, THROUGH_ACCELERATE = "wrap_model, rank 0's values", "wrap_model through Accelerate"
PICKLE, TIED, HUB = "materialize, a pickle file", "materialize, a stored tie", "materialize, a hub id"
IN_A_GROUP, VERIFY, EXPORT = "materialize", "verify_shards", "export_checkpoint"
NATIVE, FACADE = "NativeFSDPStrategy, and wrap_model", "TransformersModel"
NEW, LEFT_BLANK, WITH_OPTIMIZER = "from_config", "wrap_model, left blank", "wrap_model, an optimizer"


def write_models(directory: Path) -> Path:
    """Save what the calls load."""
    for name in ("causal", "pickle", "plain", "tied"):
        (directory / name).mkdir()
    write_checkpoint("qwen3_tied", directory / "causal")
    save_file(PlainNet().state_dict(), directory / "plain" / "model.safetensors")
    torch.save(PlainNet().state_dict(), directory / "pickle" / "pytorch_model.bin")
    state = {name: value.clone() for name, value in TiedNet().state_dict().items()}
    save_file(state, directory / "tied" / "model.safetensors")
    return directory


def _filled(arguments: list[Any]) -> nn.Module:
    model, checkpoint, *options = arguments
    sw.materialize(model, checkpoint, timeout=TIMEOUT_SECONDS, **(options[0] if options else {}))
    return model  # type: ignore[no-any-return]


def _verified(arguments: list[Any]) -> nn.Module:
    model, checkpoint, options = arguments
    assert sw.verify_shards(model, checkpoint, timeout=TIMEOUT_SECONDS, **options).is_equal
    return model  # type: ignore[no-any-return]


def _exported(arguments: list[Any]) -> nn.Module:
    model, directory, options = arguments
    sw.export_checkpoint(model, directory, timeout=TIMEOUT_SECONDS, overwrite=True, **options)
    return model  # type: ignore[no-any-return]


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def _wrap(arguments: list[Any], **options: Any) -> nn.Module:
    wrapped: nn.Module = _strategy(**options).wrap_model(*arguments)
    return wrapped


def _wrap_with_others(arguments: list[Any]) -> nn.Module:
    model, *others = arguments
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    others.append(torch.optim.lr_scheduler.ConstantLR(optimizer))
    strategy = sw.AccelerateStrategy(mixed_precision="no", timeout=TIMEOUT_SECONDS)
    return strategy.wrap_model(model, optimizer, *others)[0]  # type: ignore[no-any-return]


def _wrap_by_new_strategy(arguments: list[Any]) -> nn.Module:
    model, mixed_precision, mesh = arguments
    strategy = sw.NativeFSDPStrategy(mesh, mixed_precision, timeout=TIMEOUT_SECONDS)
    return strategy.wrap_model(model)  # type: ignore[no-any-return]


def _facade(arguments: list[Any]) -> nn.Module:
    directory, strategy = arguments
    return sw.TransformersModel(directory, strategy=strategy, timeout=TIMEOUT_SECONDS).model


def _wrap_with_optimizer(arguments: list[Any]) -> nn.Module:
    optimizer = torch.optim.AdamW(arguments[0].parameters(), lr=0.1)
    wrapped, same = _strategy().wrap_model(arguments[0], optimizer)
    held = [id(parameter) for group in same.param_groups for parameter in group["params"]]
    assert held == [id(parameter) for parameter in wrapped.parameters()]
    return wrapped  # type: ignore[no-any-return]


def _strategy(**options: Any) -> sw.NativeFSDPStrategy:
    return sw.NativeFSDPStrategy(mixed_precision="no", timeout=TIMEOUT_SECONDS, **options)


def _load(arguments: list[Any], *, blank: bool = False) -> nn.Module:
    directory, dtype, model_cls = arguments
    strategy = _strategy()
    model = strategy.load_pretrained(model_cls, directory, dtype=dtype)
    if blank:
        strategy.leave_blank(model)
    wrapped: nn.Module = strategy.wrap_model(model)
    return wrapped


def _new(arguments: list[Any]) -> nn.Module:
    config, dtype, model_cls = arguments
    strategy = _strategy()
    wrapped: nn.Module = strategy.wrap_model(strategy.from_config(model_cls, config, dtype=dtype))
    return wrapped


def _seen_by_rank_0(directory: Path) -> list[Any]:
    place = directory / "causal" if dist.get_rank() == 0 else directory / "not" / "here"
    return [str(place), torch.bfloat16, _causal()]


def _causal() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _check_names(directory: Path, model: nn.Module) -> None:
    assert model.state_dict().keys() == from_checkpoint(str(directory)).state_dict().keys()


def _has_storage(_: Path, model: nn.Module) -> None:
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _check_net(_: Path, model: nn.Module) -> None:
    check_equal(model, PlainNet())


def _check_values(
    state: Callable[[Path], dict[str, torch.Tensor]], directory: Path, model: nn.Module
) -> None:
    for name, value in state(directory).items():
        got = model.get_parameter(name) if name in dict(model.named_parameters()) else model.get_buffer(name)
        assert torch.equal(got, value), name


def _without_tie(directory: Path) -> dict[str, torch.Tensor]:
    state = load_file(directory / "tied" / "model.safetensors")
    return {name: value for name, value in state.items() if name != "head.weight"}


Arguments = Callable[[Path], list[Any]]
CALLS: dict[str, tuple[Arguments, Callable[[list[Any]], nn.Module], Callable[[Path, nn.Module], None]]] = {
    HUB: (
        lambda _: [_on_meta(lambda: nn.Linear(3, 8, bias=False)), "org/name"],
        _filled,
        partial(_check_values, lambda _: {"weight": torch.arange(24.0).view(8, 3)}),
    ),
    PICKLE: (
        lambda directory: [PlainNet(seed=1), str(directory / "pickle" / "pytorch_model.bin")],
        _filled,
        partial(_check_values, lambda _: PlainNet().state_dict()),
    ),
    TIED: (
        lambda directory: [TiedNet(seed=1), str(directory / "tied")],
        _filled,
        partial(_check_values, _without_tie),
    ),
    FROM_FILES: (
        _seen_by_rank_0,
        _load,
        lambda directory, model: check_equal(model, from_checkpoint(str(directory / "causal"))),
    ),
    FROM_MEMORY: (lambda _: [PlainNet(seed=dist.get_rank())], _wrap, _check_net),
    THROUGH_ACCELERATE: (lambda _: [PlainNet(seed=dist.get_rank())], _wrap_with_others, _check_net),
    NATIVE: (lambda _: [PlainNet(seed=dist.get_rank()), "no", None], _wrap_by_new_strategy, _check_net),
    FACADE: (
        lambda directory: [str(directory / "causal"), "native_fsdp"],
        _facade,
        lambda directory, model: _check_names(directory / "causal", model),
    ),
    WITH_OPTIMIZER: (lambda _: [PlainNet(seed=dist.get_rank())], _wrap_with_optimizer, _check_net),
    LEFT_BLANK: (_seen_by_rank_0, partial(_load, blank=True), _has_storage),
    NEW: (lambda directory: [str(directory / "causal"), torch.float32, _causal()], _new, _has_storage),
    IN_A_GROUP: (
        lambda directory: [PlainNet(seed=1), str(directory / "plain"), {}],
        _filled,
        partial(_check_values, lambda _: PlainNet().state_dict()),
    ),
    VERIFY: (lambda directory: [PlainNet(), str(directory / "plain"), {}], _verified, _check_net),
    EXPORT: (
        lambda directory: [PlainNet(), directory / "exported", {}],
        _exported,
        partial(_check_values, lambda directory: load_file(directory / "exported" / "model.safetensors")),
    ),
    EVERY_RANK: (lambda _: [PlainNet()], partial(_wrap, memory_efficient_init=False), _check_net),
}
