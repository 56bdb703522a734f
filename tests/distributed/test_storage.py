"""The private fields of torch's FSDP2 that `materialization/storage.py` relies on, and what it makes of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from shardwise.materialization import entries_of, local_bytes_of, take_values
from shardwise.materialization.storage import allocate_parameters, fsdp_params_of
from shardwise.testing import RankPool
from tests.distributed.models import PlainNet

pytestmark = pytest.mark.distributed

CHANGED = (
    f"torch {torch.__version__} changed a private field of FSDP2 that shardwise/materialization/storage.py uses: "
    "compare it with torch/distributed/fsdp/_fully_shard/_fsdp_param.py. "
)


def sharded(*, on_meta: bool, placement: Callable[[nn.Parameter], Shard | None] | None = None) -> nn.Module:
    model = PlainNet()
    if on_meta:
        take_values(entries_of(model), keep=False)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    return model


def test_the_fields_are_there_and_mean_what_they_did(pool: RankPool) -> None:
    for problems in pool.run(look_at_fields, ranks=4):
        assert not problems, CHANGED + "; ".join(problems)


def look_at_fields() -> list[str]:
    """Compare what torch itself sets for a model with values against what storage.py would allocate."""
    problems = []
    model = sharded(on_meta=False)
    found = list(fsdp_params_of(model))
    managed = {id(record.sharded_param) for record in found}
    if managed != {id(p) for p in model.parameters()}:
        problems.append(f"{len(managed)} records for {len(list(model.parameters()))} parameters")
    for record in found:
        names = ("padded_sharded_param_size", "fsdp_placement", "offload_to_cpu", "pin_memory", "device")
        problems += [f"no field {name}" for name in names if not hasattr(record, name)]
        flat = getattr(record, "_sharded_param_data", None)
        if flat is None:
            problems.append("no field _sharded_param_data")
            continue
        size = record.padded_sharded_param_size
        if flat.shape != (size.numel(),):
            problems.append(f"_sharded_param_data is {tuple(flat.shape)}, expected ({size.numel()},)")
        local = record.sharded_param._local_tensor
        if local.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
            problems.append("a shard is not a view of _sharded_param_data")
    return problems


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_allocated_shards_are_padded_like_torchs_own(pool: RankPool, ranks: int) -> None:
    pool.run(compare_allocation, ranks=ranks)


def compare_allocation() -> None:
    own = dict(sharded(on_meta=False).named_parameters())
    model = sharded(on_meta=True)
    identities = {fqn: id(p) for fqn, p in model.named_parameters()}
    allocate_parameters(model, entries_of(model), torch.device("cpu"))
    assert {fqn: id(p) for fqn, p in model.named_parameters()} == identities  # optimizers stay valid
    for record in fsdp_params_of(model):
        local, flat = record.sharded_param._local_tensor, record._sharded_param_data
        assert local.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
        assert not flat[local.numel() :].any(), "padding is not zero"
    for fqn, parameter in model.named_parameters():
        like = own[fqn]
        assert isinstance(parameter, DTensor)
        assert isinstance(parameter, nn.Parameter)
        assert parameter._spec == like._spec
        for name in ("shape", "dtype", "device", "placements", "device_mesh", "requires_grad", "is_leaf"):
            assert getattr(parameter, name) == getattr(like, name), f"{fqn}.{name}"
        assert parameter.stride() == like.stride()
        assert parameter.to_local().shape == like.to_local().shape
        assert parameter.to_local().stride() == like.to_local().stride()
        storages = [p.to_local().untyped_storage().nbytes() for p in (parameter, like)]
        assert storages[0] == storages[1], f"{fqn}: {storages[0]} bytes, torch has {storages[1]}"
    assert local_bytes_of(model.parameters()) == sum(
        record.padded_sharded_param_size.numel() * 4 for record in fsdp_params_of(model)
    )


def test_shards_in_another_dtype(pool: RankPool) -> None:
    pool.run(allocate_in_bfloat16, ranks=2)


def allocate_in_bfloat16() -> None:
    own = dict(sharded(on_meta=False).to(torch.bfloat16).named_parameters())
    model = sharded(on_meta=True)
    dtype_of = dict.fromkeys(own, torch.bfloat16)
    allocate_parameters(model, entries_of(model), torch.device("cpu"), dtype_of=dtype_of)
    for fqn, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.dtype == parameter.to_local().dtype == torch.bfloat16
        assert parameter._spec == own[fqn]._spec, (
            f"{CHANGED}{fqn}: {parameter._spec}, torch has {own[fqn]._spec}"
        )


def test_shards_on_another_dim(pool: RankPool) -> None:
    pool.run(allocate_on_dim_1, ranks=4)


def columns(parameter: nn.Parameter) -> Shard | None:
    return Shard(1) if parameter.ndim == 2 and parameter.shape[1] % 4 == 0 else None


def allocate_on_dim_1() -> None:
    model = sharded(on_meta=True, placement=columns)
    allocate_parameters(model, entries_of(model), torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().fill_(dist.get_rank())
    for fqn, parameter in model.named_parameters():
        whole = parameter.full_tensor()
        if parameter.placements == (Shard(1),):
            parts = whole.chunk(4, dim=1)
            assert [part.unique().tolist() for part in parts] == [[0], [1], [2], [3]], fqn
    before = {fqn: p.to_local().untyped_storage().data_ptr() for fqn, p in model.named_parameters()}
    model(torch.zeros(2, 8))
    model.reshard()
    for layer in model.layers:
        layer.reshard()
    after = {fqn: p.to_local().untyped_storage().data_ptr() for fqn, p in model.named_parameters()}
    assert after == before


def test_a_parameter_that_has_storage_is_left_alone(pool: RankPool) -> None:
    pool.run(allocate_twice, ranks=2)


def allocate_twice() -> None:
    model = sharded(on_meta=True)
    allocate_parameters(model, entries_of(model), torch.device("cpu"))
    pointers = [p.to_local().untyped_storage().data_ptr() for p in model.parameters()]
    allocate_parameters(model, entries_of(model), torch.device("cpu"))
    assert [p.to_local().untyped_storage().data_ptr() for p in model.parameters()] == pointers
