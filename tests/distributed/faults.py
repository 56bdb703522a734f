"""Faults that are put into a load on one rank: where, on which routes, and what every rank must see.

`test_faults.py` runs them; `python -m tests.distributed.write_faults` writes the table of `docs/faults.md` from what it saw.
"""

from __future__ import annotations

import copy
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.checkpoint import SafetensorsSource, StateDictSource
from shardwise.materialization import exchange, load, storage
from tests.distributed.steps import connected_ranks

ROUTES = ("direct", "replicate", "node", "rank0", "striped", "state dict")
RANKS = 4
TIMEOUT_SECONDS = 60.0
READS = {
    "node": (0, 2),
    "rank0": (0,),
    "striped": (0,),
    "state dict": (0,),
}  # who reads, where not everybody does


class Net(nn.Module):
    """Large enough for every rank to read and to receive, with a buffer that is given and one parameter that is initialised."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.fresh = nn.Linear(64, 8)
        self.register_buffer("scale", torch.zeros(4), persistent=False)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that goes wrong on one rank.

    Args:
        name: For the table.
        phase: In which the call must end.
        on: Rank that has it, given the route.
        error: Name of the error's class on that rank.
        message: Part of the text on every rank.
        inject: Makes it happen within a context; given the route.
        routes: On which it can happen.
        change: Changes this rank's arguments of `materialize`.
    """

    name: str
    phase: str
    error: str
    message: str
    inject: Callable[[str], AbstractContextManager[Any]] = lambda _: _nothing()
    on: Callable[[str], int] = lambda _: 1
    routes: tuple[str, ...] = ROUTES
    change: Callable[[dict[str, Any]], None] = lambda _: None


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def raising(error: BaseException) -> Callable[..., Any]:
    """Return a function that raises an error, whatever it is called with: a new one each time, as it keeps what it was raised through."""

    def fail(*_: Any, **__: Any) -> Any:
        raise copy.copy(error)

    return fail


def _disk_error(route: str) -> AbstractContextManager[Any]:
    if route == "state dict":
        return mock.patch.object(StateDictSource, "read_into", raising(RuntimeError("no such memory")))
    return _failing_reads_of_tensors()


@contextmanager
def _failing_reads_of_tensors() -> Iterator[None]:
    read_scattered, preadv, of_thread = SafetensorsSource.read_scattered, os.preadv, threading.local()

    def marked(self: Any, file: str, offset: int, parts: Any) -> None:
        of_thread.reads_tensors = True
        try:
            read_scattered(self, file, offset, parts)
        finally:
            of_thread.reads_tensors = False

    def failing(fd: int, buffers: Any, offset: int) -> int:
        if getattr(of_thread, "reads_tensors", False):
            raise OSError(errno.EIO, "Input/output error")
        return preadv(fd, buffers, offset)

    with (
        mock.patch.object(SafetensorsSource, "read_scattered", marked),
        mock.patch.object(os, "preadv", failing),
    ):
        yield


def _reader(route: str) -> int:
    return READS.get(route, (1,))[-1]


def _no_memory(_: str) -> AbstractContextManager[Any]:
    text = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8192 bytes."
    return mock.patch.object(storage, "_allocate_managed", raising(RuntimeError(text)))


def _other_model(arguments: dict[str, Any]) -> None:
    arguments["model"].layers.append(nn.Linear(64, 64, device="meta"))


def _other_dtype(arguments: dict[str, Any]) -> None:
    arguments["model"].layers[1].to(torch.float64)


FAULTS = (
    Fault(
        name="one rank passes a timeout that is none",
        phase="arguments",
        error="ConfigurationError",
        message="timeout: expected a time above 0 s",
        change=lambda arguments: arguments.update(timeout=-1.0),
        routes=("direct",),
    ),
    Fault(
        name="one rank passes a device that is none",
        phase="arguments",
        error="ConfigurationError",
        message="device: expected a torch device or its name, got 'abacus'",
        change=lambda arguments: arguments.update(device="abacus"),
        routes=("direct",),
    ),
    Fault(
        name="one rank passes something else than a model",
        phase="arguments",
        error="ConfigurationError",
        message="model: expected an nn.Module, got",
        change=lambda arguments: arguments.update(model="a model"),
        routes=("direct",),
    ),
    Fault(
        name="one rank passes another `missing`",
        phase="check",
        error="RankMismatchError",
        message="option missing",
        change=lambda arguments: arguments.update(missing="error"),
    ),
    Fault(
        name="one rank passes an unknown route",
        phase="check",
        error="ConfigurationError",
        message="route: expected one of",
        change=lambda arguments: arguments.update(route="teleport"),
    ),
    Fault(
        name="one rank has another model",
        phase="check",
        error="RankMismatchError",
        message="layers.3",
        change=_other_model,
    ),
    Fault(
        name="one rank has a parameter in another dtype",
        phase="check",
        error="RankMismatchError",
        message="layers.1",
        change=_other_dtype,
    ),
    Fault(
        name="the file system refuses to look for the files",
        phase="locate",
        error="PermissionError",
        message="Permission denied",
        inject=lambda _: mock.patch.object(
            sys.modules["shardwise.materialization.open_source"],
            "locate",
            raising(PermissionError(errno.EACCES, "Permission denied")),
        ),
        routes=ROUTES[:-1],
    ),
    Fault(
        name="describing a state dict raises",
        phase="describe state dict",
        error="CheckpointError",
        message="no tensors in it",
        inject=lambda _: mock.patch.object(
            sys.modules["shardwise.materialization.open_source"],
            "StateDictSource",
            raising(sw.CheckpointError("no tensors in it")),
        ),
        on=lambda _: 0,
        routes=("state dict",),
    ),
    Fault(
        name="a header is damaged",
        phase="read headers",
        error="DamagedFileError",
        message="expected",
        inject=lambda _: mock.patch.object(
            sw.checkpoint.SafetensorsSource,
            "open",
            raising(sw.DamagedFileError("expected a header, got rubbish")),
        ),
        on=lambda _: 0,
        routes=ROUTES[:-1],
    ),
    Fault(
        name="a node has other files",
        phase="read headers",
        error="ChangedFileError",
        message="got another size",
        inject=lambda _: mock.patch.object(
            SafetensorsSource, "require_as_described", raising(sw.ChangedFileError("got another size"))
        ),
        on=lambda _: 2,
        routes=ROUTES[:-1],
    ),
    Fault(
        name="a user's function for names raises",
        phase="match names",
        error="KeyError",
        message="no such layer",
        change=lambda arguments: arguments.update(rename=raising(KeyError("no such layer"))),
    ),
    Fault(
        name="one rank renames otherwise",
        phase="compare plans",
        error="RankMismatchError",
        message="what is to be read on rank 1",
        change=lambda arguments: arguments.update(
            rename=lambda name: name.replace("layers.0", "layers.1") if "layers.0" in name else name
        ),
    ),
    Fault(
        name="a user's function for buffers raises",
        phase="plan",
        error="ZeroDivisionError",
        message="division by zero",
        change=lambda arguments: arguments.update(buffers=lambda name, tensor: 1 / 0),
    ),
    Fault(
        name="a user's function gives one rank another buffer",
        phase="plan",
        error="RankMismatchError",
        message="scale",
        change=lambda arguments: arguments.update(buffers={"scale": torch.ones(4)}),
    ),
    Fault(
        name="no host memory for the shards",
        phase="allocate",
        error="OutOfMemoryError",
        message="expected host memory for them on rank 1",
        inject=_no_memory,
    ),
    Fault(
        name="a module's initialisation raises",
        phase="initialise",
        error="ModelError",
        message="no more random numbers",
        inject=lambda _: mock.patch.object(
            nn.Linear, "reset_parameters", raising(RuntimeError("no more random numbers"))
        ),
    ),
    Fault(
        name="a disk error that stays",
        phase="read",
        error="CheckpointError",
        message="EIO",
        inject=_disk_error,
        on=_reader,
        routes=ROUTES[:-1],
    ),
    Fault(
        name="a source that raises",
        phase="read",
        error="RuntimeError",
        message="no such memory",
        inject=_disk_error,
        on=_reader,
        routes=("state dict",),
    ),
    Fault(
        name="placing what arrived raises",
        phase="read",
        error="RuntimeError",
        message="no place for it",
        inject=lambda _: mock.patch.object(
            exchange.Exchange, "_unpack", raising(RuntimeError("no place for it"))
        ),
        routes=("replicate", "node", "rank0", "striped", "state dict"),
    ),
    Fault(
        name="a replica differs after the load",
        phase="read",
        error="RankMismatchError",
        message="expected the same shards as its replicas",
        inject=lambda _: mock.patch.object(load, "require_equal_replicas", _after_a_flip),
        routes=("replicate",),
    ),
    Fault(
        name="counting up the report raises",
        phase="report",
        error="RuntimeError",
        message="cannot count",
        inject=lambda _: mock.patch.object(
            sys.modules["shardwise.materialization.materialize"],
            "collect_report",
            raising(RuntimeError("cannot count")),
        ),
    ),
)


def _after_a_flip(fqns: Any, targets: Any, **rest: Any) -> None:
    from shardwise.materialization.replicas import require_equal_replicas

    targets[fqns[0]].view(torch.int32).view(-1)[0] ^= 1
    require_equal_replicas(fqns, targets, **rest)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one rank saw.

    Args:
        error: Class of the error; empty where there was none.
        text: Of the error.
        seconds: Until it was raised.
        leaked: Threads and descriptors that are left after a load that went well.
    """

    error: str
    text: str
    seconds: float
    leaked: str


def write_files(directory: Path) -> Path:
    """Save what the model takes from a checkpoint."""
    torch.manual_seed(2)
    values = {
        f"layers.{i}.{n}": torch.randn(s)
        for i in range(3)
        for n, s in (("weight", (64, 64)), ("bias", (64,)))
    }
    save_file(values, directory / "model.safetensors")
    return directory


def run_fault(directory: str, number: int, route: str) -> Seen:
    """Run one fault on this rank, then load again without it and check the values."""
    fault, rank = FAULTS[number], dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    before = resources()
    arguments = _arguments(directory, route, mesh)
    has_it = rank == fault.on(route)
    if has_it:
        fault.change(arguments)
    model = arguments.pop("model")
    started, error, text = time.monotonic(), "", ""
    with connected_ranks(), _as_two_nodes(rank), fault.inject(route) if has_it else _nothing():
        try:
            sw.materialize(model, **arguments)
        except Exception as caught:
            error, text = type(caught).__name__, str(caught)
    seconds = time.monotonic() - started
    del model
    again = _arguments(directory, route, mesh)
    model = again.pop("model")
    with connected_ranks(), _as_two_nodes(rank):
        sw.materialize(model, **again)
    values = load_file(Path(directory) / "model.safetensors")
    for name, value in values.items():
        assert torch.equal(model.get_parameter(name).full_tensor(), value), name
    assert model.fresh.weight.full_tensor().isfinite().all()
    dist.barrier()
    return Seen(error=error, text=text, seconds=seconds, leaked=leaked(before))


def _arguments(directory: str, route: str, mesh: DeviceMesh) -> dict[str, Any]:
    with torch.device("meta"):
        model = Net()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    checkpoint: Any = directory
    if route == "state dict":
        values = load_file(Path(directory) / "model.safetensors") if dist.get_rank() == 0 else None
        checkpoint = values
    return {
        "model": model,
        "checkpoint": checkpoint,
        "route": "auto" if route == "state dict" else route,
        "missing": "init",
        "buffers": {"scale": torch.zeros(4)},
        "cpu_storage": "copy",
        "staging_bytes": 65_536,  # so little that every rank has something to read
        "timeout": TIMEOUT_SECONDS,
    }


@contextmanager
def _as_two_nodes(rank: int) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"GROUP_RANK": str(rank // 2)}):
        yield


def resources() -> tuple[set[str], int]:
    """Return the names of this process's threads, and how many descriptors it has open."""
    threads = {thread.name for thread in threading.enumerate()}
    return threads, len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0


def leaked(before: tuple[set[str], int]) -> str:
    """Return what a load has left, given what there was before it; nothing if it has left nothing."""
    threads, files = resources()
    ours = sorted(name for name in threads - before[0] if name.startswith("shardwise"))
    found = [f"threads {', '.join(ours)}"] if ours else []
    # The first load of a process opens what torch keeps; a fault may not add more than that.
    if files > before[1] + 8:
        found.append(f"{files - before[1]} descriptors")
    return "; ".join(found)
