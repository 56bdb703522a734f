"""A small model, and the ways in which people lay one out over four ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardwise.materialization.storage import fsdp_params_of
from tests.distributed.steps import local_of

HIDDEN = 12
UNEVEN = 27  # over 2 x 2 ranks: 7, 7, 7 and 6 rows
EVEN = 28  # torch's tensor parallelism computes with equal shards only
ROWS = 13


class Layer(nn.Module):
    """Two projections, which tensor parallelism cuts by rows and by columns, and a norm that it leaves whole."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, inner)
        self.down = nn.Linear(inner, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Tower(nn.Module):
    """Layers between an embedding and a head of a prime number of rows."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, HIDDEN)
        self.layers = nn.ModuleList(Layer(inner) for _ in range(2))
        self.head = nn.Linear(HIDDEN, ROWS, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tower(inner: int) -> Tower:
    """Return a tower with random values in all of its parameters, the same in every process."""
    torch.manual_seed(3)
    model = Tower(inner)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def tower_on_meta(inner: int) -> Tower:
    """Return a tower without values."""
    with torch.device("meta"):
        return Tower(inner)


def write_tower(directory: Path, inner: int) -> str:
    """Save a tower, and return the path of its file."""
    path = directory / f"tower-{inner}.safetensors"
    save_file(tower(inner).state_dict(), path)
    return str(path)


def token_ids() -> torch.Tensor:
    """Return a batch that every rank computes on."""
    return torch.arange(2 * 5).view(2, 5) % ROWS


def _tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    for layer in model.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _units(model: nn.Module, mesh: DeviceMesh, **arguments: Any) -> None:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **arguments)
    fully_shard(model, mesh=mesh, **arguments)


def one_axis(model: nn.Module) -> None:
    """FSDP over all ranks."""
    _units(model, mesh_of(dp_shard=dist.get_world_size()))


def replicate_shard(model: nn.Module) -> None:
    """HSDP."""
    _units(model, mesh_of(dp_replicate=2, dp_shard=2))


def shard_tensor(model: nn.Module) -> None:
    """FSDP on top of tensor parallelism: both cut the rows of `up`."""
    mesh = mesh_of(dp_shard=2, tp=2)
    _tensor_parallel(model, mesh["tp"])
    _units(model, mesh["dp_shard"])


def replicate_tensor(model: nn.Module) -> None:
    """HSDP on top of tensor parallelism, with one shard."""
    mesh = mesh_of(dp_replicate=2, dp_shard=1, tp=2)
    _tensor_parallel(model, mesh["tp"])
    _units(model, mesh["dp_replicate", "dp_shard"])


def tensor_alone(model: nn.Module) -> None:
    """Tensor parallelism without FSDP: what it leaves whole is a plain tensor on every rank."""
    _tensor_parallel(model, mesh_of(tp=dist.get_world_size()))


def tensor_copies(model: nn.Module) -> None:
    """Tensor parallelism in two groups, each of which knows its own mesh only."""
    _tensor_parallel(model, mesh_of(dp=2, tp=2)["tp"])


LAYOUTS: dict[str, Callable[[nn.Module], None]] = {
    "one axis": one_axis,
    "replicate x shard": replicate_shard,
    "shard x tensor": shard_tensor,
    "replicate x tensor": replicate_tensor,
    "tensor alone": tensor_alone,
    "tensor, two copies": tensor_copies,
}


def mesh_of(**axes: int) -> DeviceMesh:
    """Return a mesh over all ranks with these axes."""
    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def require_same_shards(model: nn.Module, expected: nn.Module) -> None:
    """Fail unless each rank holds the very shards that laying out a model with values has given it."""
    wanted = dict(expected.named_parameters()) | dict(expected.named_buffers())
    got = dict(model.named_parameters()) | dict(model.named_buffers())
    assert list(got) == list(wanted)
    for name, tensor in got.items():
        like = wanted[name]
        assert type(tensor) is type(like), name
        if isinstance(tensor, DTensor):
            assert (tensor.placements, tensor.shape) == (like.placements, like.shape), name
        assert tensor.dtype == like.dtype, name
        assert torch.equal(local_of(tensor), local_of(like)), name


def shard_pointers(model: nn.Module) -> dict[str, int]:
    """Return where the storage of each shard lies that FSDP2 manages."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p.sharded_param)]: p._sharded_param_data.data_ptr() for p in fsdp_params_of(model)}
