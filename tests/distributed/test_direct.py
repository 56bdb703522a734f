"""Every rank reads its own bytes: `materialize` and deferred models, on many layouts."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import shardwise as sw
from shardwise.materialization.storage import fsdp_params_of
from shardwise.testing import RankPool
from tests.distributed.models import check_equal, from_checkpoint
from tests.distributed.steps import (
    Checkpoint,
    by_strategy,
    every_rank,
    language_loss,
    load,
    local_of,
    make_strategy,
    own_rows,
    token_batch,
)

pytestmark = pytest.mark.distributed


class Block(nn.Module):
    """Two projections, uneven sizes, a norm and a persistent buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width + 3)
        self.down = nn.Linear(2 * width + 3, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x plus what the projections make of it."""
        return x + self.down(torch.relu(self.up(self.norm(x) + self.bias)))


class Net(nn.Module):
    """Blocks, an embedding, a head; dims that few numbers of ranks divide."""

    def __init__(self, *, width: int = 12, depth: int = 3, rows: int = 37) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.head(self.blocks(self.embed(ids)))


@pytest.fixture(scope="module")
def net_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with random values for `Net`, in float32."""
    torch.manual_seed(3)
    model = Net()
    path = tmp_path_factory.mktemp("net") / "model.safetensors"
    save_file({name: torch.randn_like(value) for name, value in model.state_dict().items()}, path)
    return path


def reference_net(path: str, *, dtype: torch.dtype = torch.float32) -> Net:
    model = Net().to(dtype)
    from safetensors.torch import load_file

    model.load_state_dict({name: value.to(dtype) for name, value in load_file(path).items()})
    return model


def meta_net() -> Net:
    with torch.device("meta"):
        return Net()


def shard_by_hand(model: Net, mesh: Any = None, **options: Any) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


# --- whoever sharded it ---


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("cpu_storage", ["map", "copy"])
def test_a_model_that_was_sharded_by_hand(
    pool: RankPool, net_checkpoint: Path, ranks: int, cpu_storage: str
) -> None:
    pool.run(fill_by_hand, str(net_checkpoint), cpu_storage, ranks=ranks)


def fill_by_hand(path: str, cpu_storage: str) -> None:
    model = meta_net()
    shard_by_hand(model)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    report = sw.materialize(model, path, cpu_storage=cpu_storage)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    check_equal(model, reference_net(path))
    assert report.route == "direct"
    assert report.tensors == {"checkpoint": len(reference_net(path).state_dict())}
    assert set(report.origins.values()) == {"checkpoint"}
    assert report.predicted["storage_bytes"] == report.storage_bytes
    pointers = {p: p._sharded_param_data.data_ptr() for p in fsdp_params_of(model)}
    torch.manual_seed(dist.get_rank())
    model(torch.randint(0, 37, (4, 6))).sum().backward()
    optimizer.step()
    assert {p: p._sharded_param_data.data_ptr() for p in fsdp_params_of(model)} == pointers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_values_are_cast_while_they_are_read(
    pool: RankPool, net_checkpoint: Path, dtype: torch.dtype
) -> None:
    pool.run(fill_in_dtype, str(net_checkpoint), dtype, ranks=3)


def fill_in_dtype(path: str, dtype: torch.dtype) -> None:
    model = meta_net()
    shard_by_hand(model)
    report = sw.materialize(model, path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert report.dtypes["stored"] == str(dtype).removeprefix("torch.")
    expected = reference_net(path)
    for name, parameter in expected.named_parameters():
        parameter.data = parameter.data.to(dtype)
        got = dict(model.named_parameters())[name].full_tensor()
        assert torch.equal(got, parameter), name


def test_tensor_parallelism_and_fsdp_on_the_same_dim(pool: RankPool, net_checkpoint: Path) -> None:
    pool.run(fill_two_axes, str(net_checkpoint), ranks=4)


def fill_two_axes(path: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    model = meta_net()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], plan)
    shard_by_hand(model, mesh["fsdp"])
    sw.materialize(model, path)
    expected = reference_net(path)
    # What each rank holds is the tensor-parallel shard cut by FSDP, uneven as it is.
    tp, fsdp = mesh["tp"].get_local_rank(), mesh["fsdp"].get_local_rank()
    for got, wanted in zip(model.blocks, expected.blocks, strict=True):
        assert torch.equal(local_of(got.up.weight), wanted.up.weight.chunk(2)[tp].chunk(2)[fsdp])
        assert torch.equal(local_of(got.up.bias), wanted.up.bias.chunk(2)[tp].chunk(2)[fsdp])
        assert torch.equal(local_of(got.down.weight), wanted.down.weight.chunk(2, 1)[tp].chunk(2)[fsdp])
    assert torch.equal(local_of(model.embed.weight), expected.embed.weight.chunk(2)[fsdp])


def test_a_model_that_nobody_sharded_is_whole_on_every_rank(pool: RankPool, net_checkpoint: Path) -> None:
    pool.run(fill_whole, str(net_checkpoint), ranks=2)


def fill_whole(path: str) -> None:
    model = meta_net()
    sw.materialize(model, path)
    check_equal(model, reference_net(path))
    with torch.no_grad():  # pages are private: neither the file nor the other rank sees this
        model.head.weight.add_(dist.get_rank() + 1)
    dist.barrier()
    again = meta_net()
    sw.materialize(again, path)
    check_equal(again, reference_net(path))


def test_column_shards_are_read_once_and_exchanged(pool: RankPool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.randn(64, 4096, dtype=torch.bfloat16)}, path)
    pool.run(fill_columns, str(path), torch.bfloat16, ranks=4)
    pool.run(fill_columns, str(path), torch.float32, ranks=3)


def fill_columns(path: str, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Linear(4096, 64, bias=False, device="meta", dtype=dtype)
    empty = distribute_tensor(model.weight.data, mesh, [Shard(1)], src_data_rank=None)
    model.weight = nn.Parameter(empty)
    report = sw.materialize(model, path)
    whole = load_file(path)["weight"]
    assert torch.equal(
        local_of(model.weight), whole.to(dtype).chunk(dist.get_world_size(), 1)[dist.get_rank()]
    )
    assert report.storage_bytes == whole.nbytes  # and not once per rank
    assert report.network_bytes > 0


# --- storage that is there already ---


def test_parameters_with_storage_are_filled_in_place_again_after_a_step(
    pool: RankPool, net_checkpoint: Path
) -> None:
    pool.run(fill_again, str(net_checkpoint), ranks=3)


def fill_again(path: str) -> None:
    model = meta_net()
    shard_by_hand(model, reshard_after_forward=False)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            local_of(parameter).fill_(float("nan"))
    sw.materialize(model, path)
    check_equal(model, reference_net(path))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.arange(12).view(3, 4)
    before = model(ids)
    before.sum().backward()
    optimizer.step()
    pointers = {p: p._sharded_param_data.data_ptr() for p in fsdp_params_of(model)}
    model(ids)  # leaves the parameters gathered
    sw.materialize(model, path)
    assert {p: p._sharded_param_data.data_ptr() for p in fsdp_params_of(model)} == pointers
    torch.testing.assert_close(model(ids), before)


@pytest.mark.parametrize(("ranks", "tensor_parallel"), [(2, 1), (3, 1), (2, 2), (4, 2), (4, 4)])
def test_without_a_checkpoint_values_do_not_depend_on_the_number_of_ranks(
    pool: RankPool, ranks: int, tensor_parallel: int
) -> None:
    sums = pool.run(initialise_all, tensor_parallel, ranks=ranks)
    assert len(set(sums)) == 1
    assert sums[0] == pool.run(initialise_all, 1, ranks=1)[0]


def initialise_all(tensor_parallel: int) -> str:
    torch.manual_seed(11 if dist.get_rank() == 0 else 99)  # the first rank's seed counts
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.Embedding(5, 3))
    shape = (dist.get_world_size() // tensor_parallel, tensor_parallel)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("fsdp", "tp"))
    if tensor_parallel > 1:  # of columns, whose number decides how wide a linear layer starts
        parallelize_module(model, mesh["tp"], {"0": RowwiseParallel()})
    fully_shard(model, mesh=mesh["fsdp"])
    report = sw.materialize(model, None)
    assert report.tensors == {"initialised": 5}
    assert model[1].weight.full_tensor().eq(1).all()
    full = torch.cat([parameter.full_tensor().flatten() for parameter in model.parameters()])
    assert full.isfinite().all()
    assert 0.1 < model[0].weight.full_tensor().std() < 0.4
    return str(full.double().sum().item())


def test_a_state_dict_of_the_first_rank(pool: RankPool, net_checkpoint: Path) -> None:
    pool.run(fill_from_state_dict, str(net_checkpoint), ranks=3)


def fill_from_state_dict(path: str) -> None:
    from safetensors.torch import load_file

    model = meta_net()
    shard_by_hand(model)
    values = load_file(path) if dist.get_rank() == 0 else {}
    report = sw.materialize(
        model, {f"old.{name}": value.double() for name, value in values.items()}, rename=lambda n: f"old.{n}"
    )
    check_equal(model, reference_net(path))
    assert report.route == "rank0"
    assert report.storage_bytes == 0


# --- names ---


def test_renamed_and_wrapped_names(pool: RankPool, net_checkpoint: Path) -> None:
    pool.run(fill_renamed, str(net_checkpoint), ranks=2)


def fill_renamed(path: str) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = meta_net()
    model.top = model.head
    del model.head
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    compiled = torch.compile(model.blocks[0])
    model.blocks[0] = compiled  # type: ignore[assignment]
    shard_by_hand(model)
    sw.materialize(model, path, rename={"top.weight": "head.weight", "top.bias": "head.bias"})
    expected = reference_net(path)
    assert torch.equal(model.top.weight.full_tensor(), expected.head.weight)
    got = {
        name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""): p
        for name, p in model.named_parameters()
    }
    assert torch.equal(got["blocks.0.up.weight"].full_tensor(), expected.blocks[0].up.weight)
    assert torch.equal(got["blocks.1.down.weight"].full_tensor(), expected.blocks[1].down.weight)


def test_two_parameters_of_one_stored_tensor_do_not_share_memory(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    model = nn.Module()
    model.x = nn.Parameter(torch.empty(4, 4, device="meta"))
    model.y = nn.Parameter(torch.empty(4, 4, device="meta"))
    sw.materialize(model, tmp_path, rename={"x": "a", "y": "a"}, cpu_storage="auto")
    with torch.no_grad():
        model.x.zero_()
    assert model.y.eq(1).all()


# --- deferred models ---


@by_strategy
def test_a_deferred_model_inside_another_one(pool: RankPool, checkpoint: Checkpoint, strategy: str) -> None:
    pool.run(wrap_two_parts, strategy, checkpoint("qwen3_tied"), checkpoint("gpt2"), ranks=3)


class Pair(nn.Module):
    """Two language models and a head of its own that no checkpoint knows."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.head = nn.Linear(6, 7, dtype=torch.bfloat16)


def wrap_two_parts(name: str, first: str, second: str) -> None:
    strategy = make_strategy(name)
    torch.manual_seed(dist.get_rank())  # the first rank's head counts
    model = Pair(load(strategy, first, defer=True), load(strategy, second, defer=True))
    strategy.wrap_model(model)
    check_equal(model.first, from_checkpoint(first))
    check_equal(model.second, from_checkpoint(second))
    torch.manual_seed(0)
    assert torch.equal(model.head.weight.full_tensor(), nn.Linear(6, 7, dtype=torch.bfloat16).weight)
    report = strategy.last_report
    assert report.route == "direct + rank0"
    assert report.storage_bytes > 0


@by_strategy
def test_the_first_forward_moves_nothing_and_a_step_is_right(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    pool.run(step_deferred, strategy, checkpoint("qwen3_untied"), ranks=3)


def step_deferred(name: str, directory: str) -> None:
    strategy = make_strategy(name)
    model = load(strategy, directory, defer=True, dtype=torch.float32)
    assert all(p.is_meta for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = strategy.wrap_model(model, optimizer)
    pointers = {p: p._sharded_param_data.data_ptr() for p in fsdp_params_of(model)}
    loss = language_loss(model, own_rows(token_batch()))
    assert {p: p._sharded_param_data.data_ptr() for p in fsdp_params_of(model)} == pointers
    losses = every_rank(loss.item())
    reference = language_loss(from_checkpoint(directory, dtype=torch.float32), token_batch())
    assert sum(losses) / len(losses) == pytest.approx(reference.item(), rel=1e-4)


@by_strategy
@pytest.mark.parametrize("cpu_storage", ["map", "copy"])
def test_files_are_closed_after_a_wrap(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, cpu_storage: str
) -> None:
    pool.run(wrap_and_count_files, strategy, checkpoint("qwen3_tied"), cpu_storage, ranks=2)


def wrap_and_count_files(name: str, directory: str, cpu_storage: str) -> None:
    gc.collect()  # pages that an earlier job of this process had mapped
    before = open_in(directory)
    strategy = make_strategy(name, cpu_storage=cpu_storage)
    model = strategy.wrap_model(load(strategy, directory, defer=True))
    # Python's mmap keeps a descriptor of its own for as long as the pages live; the checkpoint is one file.
    assert open_in(directory) - before <= (1 if cpu_storage == "map" else 0)
    check_equal(model, from_checkpoint(directory))


def open_in(directory: str) -> int:
    folder = Path("/proc/self/fd")
    targets = [os.path.realpath(each) for each in folder.iterdir()] if folder.is_dir() else []
    return sum(target.startswith(os.path.realpath(directory)) for target in targets)


@pytest.mark.parametrize("staging_bytes", [1024, 2**20])
def test_a_file_that_cannot_be_mapped_is_read_through_any_staging(
    pool: RankPool, net_checkpoint: Path, staging_bytes: int
) -> None:
    pool.run(fill_unmapped, str(net_checkpoint), staging_bytes, ranks=2)


def fill_unmapped(path: str, staging_bytes: int) -> None:
    from shardwise.checkpoint import SafetensorsSource
    from shardwise.materialization.read import Shards

    original, in_place = SafetensorsSource.mapped, Shards.in_place
    SafetensorsSource.mapped = lambda _, runs: [None] * len(runs)  # type: ignore[method-assign, assignment]
    Shards.in_place = lambda *_: None  # type: ignore[method-assign, assignment]
    try:
        model = meta_net()
        shard_by_hand(model)
        sw.materialize(model, path, staging_bytes=staging_bytes)
    finally:
        SafetensorsSource.mapped, Shards.in_place = original, in_place  # type: ignore[method-assign]
    check_equal(model, reference_net(path))


# --- verify_shards ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_flipped_byte_is_found_and_named(pool: RankPool, net_checkpoint: Path, dtype: torch.dtype) -> None:
    pool.run(find_difference, str(net_checkpoint), dtype, ranks=3)


def find_difference(path: str, dtype: torch.dtype) -> None:
    model = meta_net()
    shard_by_hand(model)
    sw.materialize(model, path, dtype=dtype, cpu_storage="copy")
    report = sw.verify_shards(model, path)
    assert report.is_equal
    assert report.tensors == len(model.state_dict())
    assert report.absent == ()
    assert report.casts == (() if dtype == torch.float32 else ("float32 to bfloat16",))
    assert ("cast before they were compared: float32 to bfloat16" in report.summary()) == bool(report.casts)
    if dist.get_rank() == 1:
        shard = local_of(model.blocks[1].up.weight).view(torch.uint8)
        with torch.no_grad():
            shard[4, 2] ^= 1
    report = sw.verify_shards(model, path, staging_bytes=1024)
    assert [(m.fqn, m.rank, m.elements) for m in report.mismatches] == [("blocks.1.up.weight", 1, 1)]
    size = dtype.itemsize
    assert report.mismatches[0].first_index == (4, 2 // size)
    assert report.summary().startswith(f"{path}: {report.tensors} tensors compared, 1 shard differs\n")
    several = replace(report, mismatches=report.mismatches * 23)
    assert several.summary().count("1 element differs") == 20
    assert several.summary().endswith("and 3 more")
    assert "blocks.1.up.weight (rank 1): 1 element differs from" in report.summary()
    assert "model.safetensors" in report.summary()


def test_the_collector_rests_while_the_model_is_built(pool: RankPool, checkpoint: Checkpoint) -> None:
    """It walks all that a build on meta adds, though all of it stays; it is on again afterwards, and after an error."""
    pool.run(build_without_collector, checkpoint("qwen3_tied"), ranks=1)


def build_without_collector(directory: str) -> None:
    from transformers import AutoModelForCausalLM

    seen = []

    class Watched(AutoModelForCausalLM):
        @classmethod
        def from_config(cls, config: Any, **kwargs: Any) -> Any:
            seen.append(gc.isenabled())
            if len(seen) > 2:
                raise ValueError("no such model")
            return AutoModelForCausalLM.from_config(config, **kwargs)

    strategy = make_strategy("native_fsdp")
    strategy.load_pretrained(Watched, directory)
    assert gc.isenabled()
    strategy.from_config(Watched, directory)
    assert gc.isenabled()
    with pytest.raises(ValueError, match="no such model"):
        strategy.from_config(Watched, directory)
    assert gc.isenabled()
    assert seen == [False, False, False]
