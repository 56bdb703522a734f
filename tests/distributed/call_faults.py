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
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import shardwise as sw
from tests.distributed.fault_calls import (
    CALLS,
    EVERY_RANK,
    EXPORT,
    FACADE,
    FROM_FILES,
    FROM_MEMORY,
    HUB,
    IN_A_GROUP,
    LEFT_BLANK,
    NATIVE,
    NEW,
    PICKLE,
    THROUGH_ACCELERATE,
    TIED,
    VERIFY,
    WITH_OPTIMIZER,
)
from tests.distributed.faults import Seen, leaked, raising, resources
from tests.distributed.models import PlainNet
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
