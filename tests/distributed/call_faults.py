"""Faults that are put into other calls than a plain `materialize`: loads from a hub or a pickle file, `load_pretrained`, `wrap_model`.

`test_faults.py` runs them; `python -m tests.distributed.write_faults` writes the table of `docs/faults.md` from what it saw.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

import shardwise as sw
from tests.distributed.faults import TIMEOUT_SECONDS, Seen, leaked, raising, resources
from tests.distributed.models import PlainNet, TiedNet, check_equal, from_checkpoint, write_checkpoint
from tests.distributed.steps import connected_ranks, every_rank
from tests.distributed.test_hub_ranks import hub_of_rank

# Functions of the same names stand before some of these modules.
fill, open_source, scatter, storage, stored_ties = (
    import_module(f"shardwise.materialization.{name}")
    for name in ("fill", "open_source", "scatter", "storage", "stored_ties")
)
filling, noted, pretrained, rebound, sharding, wrap = (
    import_module(f"shardwise.strategies.{name}")
    for name in ("filling", "noted", "pretrained", "optimizers", "sharding", "wrap")
)
materializing = import_module("shardwise.materialization.materialize")

RANKS = 2
EVERY_RANK, FROM_FILES = "wrap_model, every rank's values", "load_pretrained"
FROM_MEMORY, THROUGH_ACCELERATE = "wrap_model, rank 0's values", "wrap_model through Accelerate"
PICKLE, TIED, HUB = "materialize, a pickle file", "materialize, a stored tie", "materialize, a hub id"
IN_A_GROUP, VERIFY, EXPORT = "materialize", "verify_shards", "export_checkpoint"
NATIVE, FACADE = "NativeFSDPStrategy, and wrap_model", "TransformersModel"
NEW, LEFT_BLANK, WITH_OPTIMIZER = "from_config", "wrap_model, left blank", "wrap_model, an optimizer"


@dataclass(frozen=True, kw_only=True)
class CallFault:
    """Something that goes wrong on one rank in a call; the words are those of `Fault`.

    Args:
        call: One of `CALLS`.
        change: Changes this rank's arguments of the call.
    """

    name: str
    call: str
    phase: str
    error: str
    message: str
    on: int = 1
    inject: Callable[[], AbstractContextManager[Any]] = nullcontext
    change: Callable[[list[Any]], None] = lambda _: None


def _put(at: int, value: Any) -> Callable[[list[Any]], None]:
    return lambda arguments: arguments.__setitem__(at, value)


_NO_MEMORY = RuntimeError(
    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8192 bytes."
)
_EIO = OSError(errno.EIO, "Input/output error")

CALL_FAULTS = (
    CallFault(
        name="the hub refuses the download",
        call=HUB,
        phase="download",
        error="CheckpointError",
        message="no space left",
        on=0,
        inject=lambda: mock.patch.object(
            open_source, "download", raising(sw.CheckpointError("org/name: no space left"))
        ),
    ),
    CallFault(
        name="a pickle file is damaged",
        call=PICKLE,
        phase="read pickle",
        error="DamagedFileError",
        message="unexpected end of data",
        on=0,
        inject=lambda: mock.patch.object(torch, "load", raising(RuntimeError("unexpected end of data"))),
    ),
    CallFault(
        name="a disk error where both names of a tie are stored",
        call=TIED,
        phase="compare tied tensors",
        error="OSError",
        message="Input/output error",
        on=0,
        inject=lambda: mock.patch.object(stored_ties, "_read", raising(_EIO)),
    ),
    CallFault(
        name="one rank asks for another dtype",
        call=FROM_FILES,
        phase="check",
        error="RankMismatchError",
        message="an argument of load_pretrained",
        change=_put(1, torch.float32),
    ),
    CallFault(
        name="a disk error while the config is read for ranks that do not see the files",
        call=FROM_FILES,
        phase="configuration",
        error="OSError",
        message="Input/output error",
        on=0,
        inject=lambda: mock.patch.object(open_source, "read_text", raising(_EIO)),
    ),
    CallFault(
        name="the model's class raises",
        call=FROM_FILES,
        phase="build",
        error="ValueError",
        message="no such attention",
        inject=lambda: mock.patch.object(pretrained, "build_empty", raising(ValueError("no such attention"))),
    ),
    CallFault(
        name="one rank passes something else than a model",
        call=FROM_MEMORY,
        phase="check",
        error="ConfigurationError",
        message="wrap_model: expected a model first, an nn.Module, got str",
        change=_put(0, "a model"),
    ),
    CallFault(
        name="one rank passes something else than an optimizer",
        call=FROM_MEMORY,
        phase="check",
        error="ConfigurationError",
        message="wrap_model: expected optimizers after the model, got int",
        change=lambda arguments: arguments.append(3),
    ),
    CallFault(
        name="one rank passes something that Accelerate cannot prepare",
        call=THROUGH_ACCELERATE,
        phase="check",
        error="ConfigurationError",
        message="wrap_model: expected optimizers, schedulers and data loaders after the model, got int",
        change=lambda arguments: arguments.append(3),
    ),
    CallFault(
        name="one rank has another model",
        call=FROM_MEMORY,
        phase="check",
        error="RankMismatchError",
        message="layers.2",
        change=lambda arguments: arguments[0].layers.append(nn.Linear(8, 8)),
    ),
    CallFault(
        name="`fully_shard` raises",
        call=FROM_MEMORY,
        phase="shard",
        error="ValueError",
        message="cannot shard",
        inject=lambda: mock.patch.object(sharding, "fully_shard", raising(ValueError("cannot shard"))),
    ),
    CallFault(
        name="the transfer cannot be planned",
        call=FROM_MEMORY,
        phase="describe",
        error="RuntimeError",
        message="no plan",
        inject=lambda: mock.patch.object(fill, "plan_scatter", raising(RuntimeError("no plan"))),
    ),
    CallFault(
        name="no host memory for the shards",
        call=FROM_MEMORY,
        phase="allocate",
        error="OutOfMemoryError",
        message="expected host memory for them on rank 1",
        inject=lambda: mock.patch.object(storage, "_allocate_managed", raising(_NO_MEMORY)),
    ),
    CallFault(
        name="the source rank fails while it sends",
        call=FROM_MEMORY,
        phase="transfer",
        error="RuntimeError",
        message="cannot send",
        on=0,
        inject=lambda: mock.patch.object(
            scatter.Scatter, "_start_packed", raising(RuntimeError("cannot send"))
        ),
    ),
    CallFault(
        name="placing what arrived raises",
        call=FROM_MEMORY,
        phase="transfer",
        error="RuntimeError",
        message="no place for it",
        inject=lambda: mock.patch.object(
            scatter.Scatter, "_finish", raising(RuntimeError("no place for it"))
        ),
    ),
    CallFault(
        name="what is on record of the values cannot be sent",
        call=FROM_MEMORY,
        phase="finish",
        error="TypeError",
        message="not JSON serializable",
        on=0,
        inject=lambda: mock.patch.object(noted.Origins, "take", return_value={"out.weight": object()}),
    ),
    CallFault(
        name="counting up the report raises",
        call=FROM_MEMORY,
        phase="report",
        error="RuntimeError",
        message="cannot count",
        inject=lambda: mock.patch.object(wrap, "collect_report", raising(RuntimeError("cannot count"))),
    ),
    CallFault(
        name="one rank was seeded otherwise",
        call=EVERY_RANK,
        phase="compare values",
        error="RankMismatchError",
        message="the values of the model on rank 1",
        change=lambda arguments: arguments.__setitem__(0, PlainNet(seed=1)),
    ),
    CallFault(
        name="`fully_shard` raises",
        call=EVERY_RANK,
        phase="shard",
        error="ValueError",
        message="cannot shard",
        inject=lambda: mock.patch.object(sharding, "fully_shard", raising(ValueError("cannot shard"))),
    ),
    CallFault(
        name="one rank passes something else than a group",
        call=IN_A_GROUP,
        phase="arguments",
        error="ConfigurationError",
        message="group: expected a ProcessGroup that this rank is in, or None, got 'world' (str)",
        change=lambda arguments: arguments[-1].update(group="world"),
    ),
    CallFault(
        name="no thread can be started, between two phases",
        call=IN_A_GROUP,
        phase="check",
        error="RuntimeError",
        message="can't start new thread",
        inject=lambda: mock.patch.object(
            materializing, "profile_memory", raising(RuntimeError("can't start new thread"))
        ),
    ),
    CallFault(
        name="one rank passes something else than a group",
        call=VERIFY,
        phase="check",
        error="ConfigurationError",
        message="group: expected a ProcessGroup that this rank is in, or None, got [0, 1] (list)",
        change=lambda arguments: arguments[-1].update(group=[0, 1]),
    ),
    CallFault(
        name="one rank passes something else than names to `rename`",
        call=VERIFY,
        phase="check",
        error="ConfigurationError",
        message="rename: expected a mapping or a function from names to names, or None, got 3 (int)",
        change=lambda arguments: arguments[-1].update(rename=3),
    ),
    CallFault(
        name="one rank passes something else than a group",
        call=EXPORT,
        phase="arguments",
        error="ConfigurationError",
        message="group: expected a ProcessGroup that this rank is in, or None, got 'world' (str)",
        change=lambda arguments: arguments[-1].update(group="world"),
    ),
    CallFault(
        name="one rank passes something else than a model",
        call=EXPORT,
        phase="arguments",
        error="ConfigurationError",
        message="model: expected an nn.Module, got 'a model' (str)",
        change=_put(0, "a model"),
    ),
    CallFault(
        name="one rank passes something else than a directory",
        call=EXPORT,
        phase="arguments",
        error="ConfigurationError",
        message="directory: expected a path, got 3",
        change=_put(1, 3),
    ),
    CallFault(
        name="one rank passes something else than a size",
        call=EXPORT,
        phase="check",
        error="RankMismatchError",
        message="option max_shard_size",
        change=lambda arguments: arguments[-1].update(max_shard_size=[5]),
    ),
    CallFault(
        name="one rank passes a dtype that is none",
        call=NEW,
        phase="build",
        error="ConfigurationError",
        message="dtype: expected",
        change=_put(1, "float33"),
    ),
    CallFault(
        name="one rank passes something else than a model's class",
        call=FROM_FILES,
        phase="check",
        error="ConfigurationError",
        message="load_pretrained: expected a model class first, got",
        change=_put(2, "AutoModel"),
    ),
    CallFault(
        name="one rank makes its strategy with an option that is none",
        call=NATIVE,
        phase="check",
        error="ConfigurationError",
        message="mixed_precision: expected one of no, bf16, fp16, fp8, got 'half'",
        change=_put(1, "half"),
    ),
    CallFault(
        name="one rank makes its strategy with a mesh that is none",
        call=NATIVE,
        phase="check",
        error="ConfigurationError",
        message="device_mesh: expected a torch DeviceMesh or None, got 'cpu'",
        change=_put(2, "cpu"),
    ),
    CallFault(
        name="one rank names a strategy that there is not",
        call=FACADE,
        phase="arguments",
        error="ConfigurationError",
        message="strategy: expected one of accelerate, native_fsdp, got 'ddp'",
        change=_put(1, "ddp"),
    ),
    CallFault(
        name="the optimizer cannot be given the sharded parameters",
        call=WITH_OPTIMIZER,
        phase="finish",
        error="OptimizerError",
        message="AdamW: expected the wrapped model to have the parameters that it was made on, got none named",
        inject=lambda: mock.patch.object(rebound, "entries_of", _losing_the_last(rebound.entries_of)),
    ),
    CallFault(
        name="Accelerate refuses to prepare a scheduler",
        call=THROUGH_ACCELERATE,
        phase="finish",
        error="ValueError",
        message="no such scheduler",
        inject=lambda: mock.patch(
            "accelerate.Accelerator.prepare_scheduler", raising(ValueError("no such scheduler"))
        ),
    ),
    CallFault(
        name="no host memory for the buffers",
        call=LEFT_BLANK,
        phase="blank buffers",
        error="OutOfMemoryError",
        message="the buffers: expected host memory for them on rank 1",
        inject=lambda: mock.patch.object(filling, "allocate_buffers", raising(_NO_MEMORY)),
    ),
)


def _losing_the_last(entries_of: Callable[..., Any]) -> Callable[..., Any]:
    calls = [0]

    def after_the_wrap(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        found = entries_of(*arguments, **options)
        return found if calls[0] == 1 else found[:-1]  # first it is asked for what the optimizer holds

    return after_the_wrap


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


def run_call_fault(directory: str, number: int) -> Seen:
    """Run one fault on this rank, then make the call again without it and check the values."""
    fault, has_it, before = CALL_FAULTS[number], dist.get_rank() == CALL_FAULTS[number].on, resources()
    arguments_of, call, check = CALLS[fault.call]
    arguments = arguments_of(Path(directory))
    if has_it:
        fault.change(arguments)
    error, text, started = "", "", time.monotonic()
    with connected_ranks(), _hub(directory), fault.inject() if has_it else nullcontext():
        try:
            call(arguments)
        except Exception as caught:
            error, text = type(caught).__name__, str(caught)
    seconds = time.monotonic() - started
    del arguments
    every_rank(None)
    with connected_ranks(), _hub(directory):
        check(Path(directory), call(arguments_of(Path(directory))))
    dist.barrier()
    return Seen(error=error, text=text, seconds=seconds, leaked=leaked(before))


def _hub(directory: str) -> AbstractContextManager[Any]:
    return hub_of_rank(f"{directory}/hub", host=os.uname().nodename, error=None)


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
