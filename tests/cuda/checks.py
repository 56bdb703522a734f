"""What only an accelerator can show of a load: values, order of streams, peaks, what is left pinned.

    PYTHONPATH=src:. python tests/cuda/checks.py [NAME ...]     # without pytest; leaves with 1 if a check fails
    python -m pytest tests/cuda

Each check is a function that raises. One process has the device; the last ones start ranks that share it, over gloo.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import shardwise as sw
from shardwise.errors import CheckpointError
from shardwise.materialization import local_bytes_of
from shardwise.materialization.pinned import PinnedMemory
from shardwise.materialization.staging import default_staging_bytes
from shardwise.materialization.storage import local_of

RANKS = 3
MEBIBYTE = 2**20
SLEEP_CYCLES = 500_000_000  # some tenths of a second
SMALL = 500


class Net(nn.Module):
    """Uneven rows, one tensor of many chunks, many small ones, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(1024, 40_001, bias=False)  # 78 MiB in bf16
        self.middle = nn.Linear(40_001, 13)
        self.small = nn.ParameterList(nn.Parameter(torch.zeros(5, 3)) for _ in range(SMALL))
        self.register_buffer("scale", torch.zeros(7))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Use every parameter."""
        out: torch.Tensor = self.middle(self.large(tokens)).sum()
        return out + sum(each.sum() for each in self.small)


def write(directory: Path) -> None:
    """Write a checkpoint whose header ends at an odd byte of the file's pages."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(t.shape).bfloat16() for name, t in Net().state_dict().items()}
    save_file(tensors, directory / "model.safetensors")


def device() -> torch.device:
    """Return the device that is checked; without one, the host, on which `values`, `failure`, `first_forward` and `ranks` can be rehearsed."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device(accelerator.type, 0) if accelerator is not None else torch.device("cpu")


@contextmanager
def group() -> Iterator[None]:
    """Have a process group of one rank, on the device's own backend."""
    here = device()
    backend = dist.get_default_backend_for_device(here)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        if here.type != "cpu":
            torch.accelerator.set_device_index(0)
            backend = f"cpu:gloo,{here.type}:{backend}"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def sharded(*, dim: int = 0) -> nn.Module:
    """Return the model on meta, sharded on the device."""
    mesh = dist.init_device_mesh(device().type, (dist.get_world_size(),))
    with torch.device("meta"):
        model = Net().bfloat16()

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(dim if parameter.ndim > dim and parameter.shape[dim] % dist.get_world_size() == 0 else 0)

    fully_shard(model, mesh=mesh, shard_placement_fn=place)
    return model


def require_values(model: nn.Module, directory: Path, *, dtype: torch.dtype) -> None:
    """Compare what this rank holds with its part of the file, on the current stream."""
    stored = load_file(directory / "model.safetensors")
    for name, tensor in model.state_dict(keep_vars=True).items():
        local, expected = local_of(tensor), stored[name].to(device())
        if isinstance(tensor, DTensor):
            expected = distribute_tensor(
                expected, tensor.device_mesh, tensor.placements, src_data_rank=None
            ).to_local()
        assert local.device == device(), name
        kept = dtype if isinstance(tensor, DTensor) else local.dtype
        assert local.dtype == kept, (name, local.dtype)
        assert torch.equal(local, expected.to(kept)), name


def values(directory: Path) -> None:
    """Equal values: as stored, cast, in columns; with small staging, so that buffers and scratch memory come round many times."""
    with group():
        for dtype, dim, staging in (
            (torch.bfloat16, 0, None),
            (torch.float32, 0, None),
            (torch.float16, 1, 4 * MEBIBYTE),
            (torch.float32, 1, 4 * MEBIBYTE),
        ):
            model = sharded(dim=dim)
            sw.materialize(model, str(directory), dtype=dtype, staging_bytes=staging)
            require_values(model, directory, dtype=dtype)


def order(directory: Path) -> None:
    """The load comes after what the current stream has been given, and the current stream after the load, with no wait of the host."""
    with group():
        stream = torch.Stream(device=device())
        torch.accelerator.set_stream(stream)
        # Memory that the shards get next is written until late by what was started before.
        junk = [torch.empty(80 * MEBIBYTE, dtype=torch.uint8, device=device()) for _ in range(3)]
        torch.cuda._sleep(SLEEP_CYCLES)
        for each in junk:
            each.fill_(255)
        del each, junk
        model = sharded()
        sw.materialize(model, str(directory))
        total = torch.stack([local_of(p).float().sum() for p in model.parameters()])
        stored = load_file(directory / "model.safetensors")
        expected = torch.stack(
            [stored[name].to(device()).float().sum() for name, _ in model.named_parameters()]
        )
        assert torch.allclose(total, expected, rtol=1e-3, atol=1e-2)
        require_values(model, directory, dtype=torch.bfloat16)
        torch.accelerator.set_stream(torch.cuda.default_stream())


def peaks(directory: Path) -> None:
    """Device memory grows by the padded shards and scratch memory at most, and returns to the shards alone."""
    module = torch.get_device_module(device())
    with group():
        for dtype in (torch.bfloat16, torch.float32):
            model = sharded()
            gc.collect()
            before = module.memory_allocated()
            module.reset_peak_memory_stats()
            with sw.profile_memory(device=device()) as profile:
                report = sw.materialize(model, str(directory), dtype=dtype)
            shards = local_bytes_of(model.parameters())
            rounding = 512 * (len(list(model.parameters())) + 8)
            peak = module.max_memory_allocated() - before
            assert peak <= shards + 2 * 16 * MEBIBYTE + rounding, (peak, shards)
            assert module.memory_allocated() - before <= shards + rounding
            assert profile.anon_peak_bytes <= default_staging_bytes("cuda") + 64 * MEBIBYTE
            assert report.storage_bytes > 0
            del model


def failure(directory: Path) -> None:
    """After a failed read nothing is pinned, and the same model can be filled."""
    preadv, calls = os.preadv, iter(range(10**6))

    def failing(*args: Any) -> int:
        if sum(map(len, args[1])) > 10_000 and next(calls) == 3:
            raise PermissionError(13, "no")
        return preadv(*args)

    with group():
        model = sharded()
        with mock.patch.object(os, "preadv", failing):
            try:
                sw.materialize(model, str(directory), cpu_storage="copy")
            except CheckpointError:
                pass
            else:
                raise AssertionError("the read did not fail")
        gc.collect()
        assert not [each for each in gc.get_objects() if isinstance(each, PinnedMemory)]
        sw.materialize(model, str(directory))
        require_values(model, directory, dtype=torch.bfloat16)


def refused_pinning(directory: Path) -> None:
    """Where the driver does not pin our pages, torch's allocator does, and the driver's error is raised by nobody."""
    real = torch.cuda.cudart()
    refusing = mock.Mock(wraps=real)
    refusing.cudaHostRegister.side_effect = lambda address, nbytes, flags: real.cudaHostRegister(
        0, nbytes, flags
    )
    with group(), mock.patch("shardwise.materialization.pinned._runtime_of", return_value=refusing):
        model = sharded()
        sw.materialize(model, str(directory), dtype=torch.float32)
        assert refusing.cudaHostRegister.called
        require_values(model, directory, dtype=torch.float32)


def first_forward(directory: Path) -> None:
    """The first forward and backward leave every shard where it is."""
    with group():
        model = sharded()
        sw.materialize(model, str(directory))
        before = [local_of(p).data_ptr() for p in model.parameters()]
        model(torch.randn(2, 1024, device=device(), dtype=torch.bfloat16)).backward()
        assert [local_of(p).data_ptr() for p in model.parameters()] == before


def ranks(directory: Path) -> None:
    """Ranks that share the device, over gloo: uneven rows, columns, small tensors that are exchanged, values from one rank's memory."""
    from shardwise.compare.launch import run_ranks
    from tests.cuda.checks import load_on_rank  # under the name by which ranks find it

    with tempfile.TemporaryDirectory() as logs:
        found = run_ranks(
            load_on_rank,
            {"directory": str(directory)},
            ranks=RANKS,
            log_directory=Path(logs),
            progress=lambda _: None,
        )
    print(json.dumps(found[0]))


def load_on_rank(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Load in several ways on one of several ranks; return bytes by way."""
    from shardwise.compare.worker import join_group_on_one_device

    join_group_on_one_device()
    directory, found = Path(arguments["directory"]), {}
    for name, options in {
        "rows": {},
        "cast": {"dtype": torch.float32},
        "striped": {"route": "striped"},
        "rank 0": {"route": "rank0", "dtype": torch.float32},
    }.items():
        model = sharded()
        report = sw.materialize(model, str(directory), **options)  # type: ignore[arg-type]
        require_values(model, directory, dtype=options.get("dtype", torch.bfloat16))  # type: ignore[arg-type]
        found[name] = [report.storage_bytes, report.network_bytes]
    stored = load_file(directory / "model.safetensors")
    model = Net().bfloat16()
    if dist.get_rank() == 0:
        model.load_state_dict(stored)
    mesh = dist.init_device_mesh(device().type, (dist.get_world_size(),))
    wrapped = sw.NativeFSDPStrategy(mesh, mixed_precision="no").wrap_model(model)
    require_values(wrapped, directory, dtype=torch.bfloat16)
    dist.barrier()
    dist.destroy_process_group()
    return found


CHECKS: dict[str, Callable[[Path], None]] = {
    check.__name__: check for check in (values, order, peaks, failure, refused_pinning, first_forward, ranks)
}


def main(names: list[str]) -> int:
    """Run checks, all of them if none is named, and say what came out."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        for name in names or CHECKS:
            try:
                CHECKS[name](Path(folder))
            except BaseException:
                traceback.print_exc()
                failed += 1
                print(f"{name}: FAILED", flush=True)
            else:
                print(f"{name}: ok", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)
