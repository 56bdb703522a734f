"""Shards that are uneven or empty: more ranks than rows, and tensor parallelism under FSDP, against plain loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import shardwise as sw
from shardwise.materialization.storage import fsdp_params_of
from shardwise.testing import RankPool
from tests.distributed.steps import local_of

pytestmark = pytest.mark.distributed


class Mlp(nn.Module):
    """Two projections around a hidden layer, and a head; sizes that nothing divides."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.head = nn.Linear(width, out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the head's logits."""
        return self.head(x + self.down(torch.relu(self.up(x))))


def saved(directory: Path, *sizes: int) -> str:
    torch.manual_seed(0)
    path = directory / "model.safetensors"
    save_file({name: torch.randn_like(value) for name, value in Mlp(*sizes).state_dict().items()}, path)
    return str(path)


def plain(path: str, sizes: tuple[int, ...]) -> Mlp:
    model = Mlp(*sizes)
    model.load_state_dict(load_file(path))
    return model


def batch(width: int) -> torch.Tensor:
    return torch.randn(5, width, generator=torch.Generator().manual_seed(1))


# --- more ranks than rows ---


@pytest.mark.parametrize("cpu_storage", ["auto", "copy"])
@pytest.mark.parametrize("sizes", [(3, 1, 2), (2, 3, 3), (3, 3, 1)], ids=str)
def test_the_first_forward_leaves_every_storage_pointer(
    pool: RankPool, tmp_path: Path, sizes: tuple[int, ...], cpu_storage: str
) -> None:
    empty = pool.run(forward_of_few_rows, saved(tmp_path, *sizes), sizes, cpu_storage, ranks=4)
    assert empty[0] == 0
    assert empty[3] == 5  # of five parameters none has a fourth row


def forward_of_few_rows(path: str, sizes: tuple[int, ...], cpu_storage: Any) -> int:
    """Return how many of this rank's shards are empty."""
    with torch.device("meta"):
        model = Mlp(*sizes)
    for layer in (model.up, model.down, model.head):
        fully_shard(layer)
    fully_shard(model)
    sw.materialize(model, path, cpu_storage=cpu_storage)
    before = pointers_of(model)
    got = model(batch(sizes[0]))
    assert pointers_of(model) == before
    expected = plain(path, sizes)
    torch.testing.assert_close(got, expected(batch(sizes[0])))
    got.sum().backward()
    assert pointers_of(model) == before
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), expected.get_parameter(name)), name
    return sum(local_of(parameter).numel() == 0 for parameter in model.parameters())


def pointers_of(model: nn.Module) -> dict[Any, tuple[int, int]]:
    """Of what FSDP2 gathers from, and of the local tensors: an empty one lies at 0 whatever happens."""
    return {
        each: (each._sharded_param_data.data_ptr(), local_of(each.sharded_param).untyped_storage().data_ptr())
        for each in fsdp_params_of(model)
    }


# --- tensor parallelism and FSDP on the same dim ---


@pytest.mark.parametrize(
    "sizes", [(6, 9, 5), (5, 7, 3), (4, 3, 1), (7, 10, 5), (5, 1, 3), (3, 17, 1)], ids=str
)
def test_tensor_parallelism_under_fsdp_equals_plain_loading(
    pool: RankPool, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    pool.run(compare_two_axes, saved(tmp_path, *sizes), sizes, ranks=4)


def compare_two_axes(path: str, sizes: tuple[int, ...]) -> None:
    """What torch's own `parallelize_module` and `fully_shard` make of a model with values is what must be on each rank."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    wanted = shard_on_two_axes(plain(path, sizes), mesh)
    with torch.device("meta"):
        empty = Mlp(*sizes)
    model = shard_on_two_axes(empty, mesh)
    sw.materialize(model, path)
    for name, expected in wanted.named_parameters():
        got = model.get_parameter(name)
        assert got.placements == expected.placements, name
        assert got.shape == expected.shape, name
        assert torch.equal(local_of(got), local_of(expected)), (name, dist.get_rank())
    report = sw.verify_shards(model, path)
    assert report.is_equal, report.summary()
    if (
        sizes[1] % 2 == 0
    ):  # torch's layers cannot compute with a hidden dim that tensor parallelism cuts unevenly
        before = pointers_of(model)
        logits = model(batch(sizes[0]))
        assert pointers_of(model) == before
        assert torch.equal(logits, wanted(batch(sizes[0])))  # the same kernels on the same shards
        torch.testing.assert_close(logits, plain(path, sizes)(batch(sizes[0])))


def shard_on_two_axes(model: Mlp, mesh: DeviceMesh) -> Mlp:
    # Colwise cuts the rows of `up` and its bias, which FSDP cuts again.
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    for layer in (model.up, model.down, model.head):
        fully_shard(layer, mesh=mesh["fsdp"])
    fully_shard(model, mesh=mesh["fsdp"])
    return model
