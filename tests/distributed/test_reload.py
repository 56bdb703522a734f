"""`materialize` into a model that has been used: its values come back, in the storage that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.materialization.storage import fsdp_params_of
from shardwise.testing import RankPool
from tests.distributed.models import check_equal, from_checkpoint
from tests.distributed.steps import (
    Checkpoint,
    by_strategy,
    language_loss,
    load,
    make_strategy,
    own_rows,
    token_batch,
)

pytestmark = pytest.mark.distributed

ROWS, WIDTH = 12, 16  # both divide by the ranks below, so that every shard can be mapped


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, ROWS), nn.ReLU(), nn.Linear(ROWS, WIDTH))


@pytest.fixture
def file(tmp_path: Path) -> str:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file(net().state_dict(), path)
    return str(path)


@pytest.mark.parametrize("used", ["forward", "backward", "optimizer step"])
@pytest.mark.parametrize("reshard", [True, False], ids=["resharded", "gathered"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_mapped_storage_gets_its_values_back(
    pool: RankPool, file: str, ranks: int, reshard: bool, used: str
) -> None:
    pool.run(use_and_reload, file, reshard, used, ranks=ranks)


def use_and_reload(file: str, reshard: bool, used: str) -> None:
    model = net().to("meta")
    for layer in (model[0], model[2]):
        fully_shard(layer, reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    before = Path(file).read_bytes()
    sw.materialize(model, file, cpu_storage="map")
    assert all(is_mapped(parameter.to_local(), file) for parameter in model.parameters())
    pointers = pointers_of(model)
    batch = torch.full((2, WIDTH), 0.25 * (dist.get_rank() + 1))
    first = model(batch)
    if used != "forward":
        first.sum().backward()
    if used == "optimizer step":
        optimizer.step()
        assert not torch.equal(model[0].weight.full_tensor(), load_file(file)["0.weight"])
    if not reshard:
        model(batch)  # leaves the parameters gathered
    report = sw.materialize(model, file)
    assert report.tensors == {"checkpoint": 4}
    assert pointers_of(model) == pointers
    expected = load_file(file)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), expected[name]), name
    torch.testing.assert_close(model(batch), first)
    assert Path(file).read_bytes() == before  # what the step wrote went to private pages


def pointers_of(model: nn.Module) -> dict[Any, int]:
    return {each: each._sharded_param_data.data_ptr() for each in fsdp_params_of(model)}


def is_mapped(tensor: torch.Tensor, file: str) -> bool:
    """Return whether a tensor lies in pages of a file, by what the kernel says."""
    at = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= at < stop:
            return line.endswith(file)
    return False


@by_strategy
def test_a_wrapped_model_after_a_training_step(pool: RankPool, checkpoint: Checkpoint, strategy: str) -> None:
    pool.run(train_and_reload, strategy, checkpoint("qwen3_tied"), ranks=2)


def train_and_reload(name: str, directory: str) -> None:
    strategy = make_strategy(name)
    model = load(strategy, directory, defer=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = strategy.wrap_model(model, optimizer)
    language_loss(model, own_rows(token_batch())).backward()
    optimizer.step()
    sw.materialize(model, directory)
    check_equal(model, from_checkpoint(directory))
