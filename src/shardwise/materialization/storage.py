"""Storage for sharded parameters, padded as FSDP2 wants it.

This is the only file that touches private fields of torch's FSDP2 and DTensor. FSDP2 keeps each shard as a view of a flat buffer
padded to the size of the first rank's shard, so that all ranks send equal sizes. A shard that arrives without padding
is copied into such a buffer at the first forward. Allocating the padded buffer here, and naming it to FSDP2, saves
that copy: the first forward leaves every shard where it is.

Checked on torch 2.13; `tests/distributed/test_storage.py` fails when a release changes these fields.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

from shardwise.materialization.structure import Entry
from shardwise.materialization.swapping import swap
from shardwise.materialization.walking import named_modules_of


def fsdp_params_of(model: nn.Module) -> Iterator[Any]:
    """Yield torch's own record (`FSDPParam`) of every parameter that FSDP2 manages in a model."""
    seen: set[int] = set()
    for _, module in named_modules_of(model):
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch < 2.12 keeps at most one group in a state
            groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
        for group in groups:
            for fsdp_param in group.fsdp_params:
                if id(fsdp_param) not in seen:
                    seen.add(id(fsdp_param))
                    yield fsdp_param


def reshard(model: nn.Module) -> None:
    """Put shards in the place of parameters that a module keeps gathered after its forward."""
    for _, module in named_modules_of(model):
        if isinstance(module, FSDPModule):
            module.reshard()


def trained_parameters_of(model: nn.Module) -> set[int]:
    """Return the identities of the parameters that an optimizer of a sharded model must hold.

    One that stands for a shard at this moment is left out: FSDP2 puts the shard back before the step.
    """
    registered = list(model.parameters())
    shards = {id(fsdp_param.sharded_param) for fsdp_param in fsdp_params_of(model)}
    return (shards | {id(p) for p in registered}) - {id(p) for p in stand_ins_among(registered, model)}


def stand_ins_among(parameters: Iterable[torch.Tensor], model: nn.Module) -> list[torch.Tensor]:
    """Return those parameters that FSDP2 puts in the place of a model's shards for a while, or has put there.

    From a forward to its backward they are gathered, or with `reshard_after_forward=N` cut over fewer ranks; the root's stay so after
    a forward without a backward.
    """
    gathered: set[int] = set()
    of_fewer_ranks: set[int] = set()  # the meshes: there are new parameters after each forward
    for fsdp_param in fsdp_params_of(model):
        gathered.add(id(getattr(fsdp_param, "_unsharded_param", None)))
        after_forward = fsdp_param.post_forward_mesh_info
        if after_forward is not None and after_forward is not fsdp_param.mesh_info:
            of_fewer_ranks.add(id(after_forward.mesh))
    return [
        parameter
        for parameter in parameters
        if id(parameter) in gathered
        or (isinstance(parameter, DTensor) and id(parameter.device_mesh) in of_fewer_ranks)
    ]


def reduce_waiting_gradients(model: nn.Module) -> None:
    """Average over the ranks what backward passes without `requires_gradient_sync` have left, as FSDP2 would in a further one.

    All ranks of the mesh call this together.

    Args:
        model: Sharded, with its shards in place; their gradients are added to.
    """
    for fsdp_param in fsdp_params_of(model):
        waiting = _take_waiting(fsdp_param)
        if waiting is None:
            continue
        shard = fsdp_param.sharded_param
        mesh = shard.device_mesh
        summed = DTensor.from_local(waiting, mesh, [Partial()] * mesh.ndim, run_check=False)
        reduced = summed.redistribute(placements=shard.placements).div_(mesh.size())
        reduced = reduced.to(device=shard.device, dtype=shard.dtype)
        shard.grad = reduced if shard.grad is None else shard.grad + reduced


def drop_waiting_gradients(model: nn.Module) -> None:
    """Drop what backward passes without `requires_gradient_sync` have left."""
    for fsdp_param in fsdp_params_of(model):
        _take_waiting(fsdp_param)


def _take_waiting(fsdp_param: Any) -> torch.Tensor | None:
    """Return a parameter's gradient that is not reduced yet, whole on this rank, and forget it."""
    waiting: torch.Tensor | None = (
        fsdp_param.unsharded_accumulated_grad
    )  # where it is reduced in another dtype
    fsdp_param.unsharded_accumulated_grad = None
    gathered = getattr(fsdp_param, "_unsharded_param", None)
    if gathered is not None and gathered.grad is not None:
        waiting = gathered.grad if waiting is None else waiting + gathered.grad
        gathered.grad = None
    return waiting


def mappable_parameters(model: nn.Module, entries: Sequence[Entry], device: torch.device) -> frozenset[str]:
    """Return the names of the meta parameters that will lie in plain host memory, which may be pages of a file.

    Args:
        model: Sharded or not.
        entries: Of the model.
        device: Where parameters outside of FSDP2 go.
    """
    managed = {id(fsdp_param.sharded_param): fsdp_param for fsdp_param in fsdp_params_of(model)}
    found = []
    for entry in entries:
        if entry.role != "parameter" or not entry.tensor.is_meta:
            continue
        fsdp_param = managed.get(id(entry.tensor))
        on, pinned = device, False
        if fsdp_param is not None:
            on, pinned = _device_of(fsdp_param), fsdp_param.pin_memory
        if on.type == "cpu" and not pinned:
            found.append(entry.fqn)
    return frozenset(found)


def allocate_parameters(
    model: nn.Module,
    entries: Sequence[Entry],
    device: torch.device,
    *,
    pages: Mapping[str, torch.Tensor] | None = None,
    dtype_of: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Give meta parameters of a model storage on this rank, its values undefined, padding zero.

    A parameter stays the same object; a tied one stays tied.

    Args:
        model: Sharded by `fully_shard` while on meta; parameters that FSDP2 ignores get their full size.
        entries: Of the parameters that get storage, among others.
        device: Where parameters outside of FSDP2 go; FSDP2's own go where its offload policy says.
        pages: Flat tensors to use in place of new memory, by name, each of a shard that needs no padding.
        dtype_of: By name, where it is not the parameter's own.
    """
    pages, dtype_of = pages or {}, dtype_of or {}
    managed = {id(fsdp_param.sharded_param): fsdp_param for fsdp_param in fsdp_params_of(model)}
    for entry in entries:
        if entry.role != "parameter" or not entry.tensor.is_meta:
            continue
        fsdp_param = managed.get(id(entry.tensor))
        dtype = dtype_of.get(entry.fqn, entry.tensor.dtype)
        if fsdp_param is not None:
            _allocate_managed(fsdp_param, dtype, pages.get(entry.fqn))
        else:
            _allocate_plain(entry, device, dtype, pages.get(entry.fqn))


def device_of_shards(model: nn.Module, device: torch.device) -> torch.device:
    """Return where the shards of a model will lie: on the host, where FSDP2's offload policy says so.

    Args:
        model: Sharded or not.
        device: Of parameters outside of FSDP2.
    """
    return next((_device_of(fsdp_param) for fsdp_param in fsdp_params_of(model)), device)


def _device_of(fsdp_param: Any) -> torch.device:
    return torch.device("cpu") if fsdp_param.offload_to_cpu else fsdp_param.device


def _allocate_managed(fsdp_param: Any, dtype: torch.dtype, pages: torch.Tensor | None) -> None:
    parameter = fsdp_param.sharded_param
    shape, dim = tuple(fsdp_param.padded_sharded_param_size), fsdp_param.fsdp_placement.dim
    local_size = tuple(parameter._local_tensor.shape)
    if pages is not None:  # the plan maps no shard that needs padding
        padded, length = pages.view(shape), shape[dim]
    else:
        padded = torch.empty(
            shape, dtype=dtype, device=_device_of(fsdp_param), pin_memory=fsdp_param.pin_memory
        )
        length = local_size[dim] if math.prod(local_size) > 0 else 0
        if length < shape[dim]:
            padded.narrow(dim, length, shape[dim] - length).zero_()
    local = padded if length == shape[dim] else padded.narrow(dim, 0, length)
    swap(parameter, _parameter_like(parameter, local))
    fsdp_param._sharded_param_data = padded.view(-1)


def _allocate_plain(
    entry: Entry, device: torch.device, dtype: torch.dtype, pages: torch.Tensor | None
) -> None:
    parameter = entry.tensor
    shape = local_of(parameter).shape
    local = pages.view(shape) if pages is not None else torch.empty(shape, dtype=dtype, device=device)
    swap(parameter, _parameter_like(parameter, local))


def _parameter_like(parameter: torch.Tensor, local: torch.Tensor) -> nn.Parameter:
    made: Any
    if isinstance(parameter, DTensor):
        # `DTensor.from_local` and `nn.Parameter` come to the same through two dispatched views and a specification worked
        # out anew, at ten times the cost; a model may have tens of thousands of parameters.
        made = DTensor(local, _spec_of(parameter, local.dtype), requires_grad=parameter.requires_grad)  # type: ignore[no-untyped-call]
        made._is_param = True
    else:
        made = nn.Parameter(local, requires_grad=parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    return made  # type: ignore[no-any-return]


def _spec_of(parameter: DTensor, dtype: torch.dtype) -> Any:
    """Return torch's record of how a parameter is sharded, for elements of a dtype."""
    spec: Any = parameter._spec
    if spec.tensor_meta.dtype == dtype:
        return spec
    return dataclasses.replace(spec, tensor_meta=spec.tensor_meta._replace(dtype=dtype))


def around_local(like: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor as that tensor: a DTensor of the same mesh, placements and full shape, or itself.

    Args:
        like: A DTensor, or a tensor that is whole on every rank.
        local: This rank's shard, or the whole.
    """
    if not isinstance(like, DTensor):
        return local
    with torch.no_grad():
        return DTensor.from_local(
            local,
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor, outside of autograd: the shard of a DTensor, else the tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def local_bytes_of(parameters: Iterable[torch.Tensor]) -> int:
    """Return the bytes of parameters' storage on this rank, padding included, tied storage counted once."""
    seen: dict[int, int] = {}
    for parameter in parameters:
        local = local_of(parameter)
        if not local.is_meta:
            storage = local.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
