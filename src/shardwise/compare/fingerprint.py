"""What a sharded model holds, as one digest per tensor: equal digests mean equal bytes, dtype, shape and ties."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from shardwise.errors import LeftOnMetaError, RankMismatchError, listed
from shardwise.materialization.names import clean_fqn
from shardwise.tensors import dtype_name

_TIED_TO: Final = " tied to "


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return dtype, shape and the sha256 of the bytes of a full tensor."""
    raw = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data
    dtype = dtype_name(tensor.dtype)
    return f"{dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"


def model_digests(model: torch.nn.Module) -> dict[str, str]:
    """Gather the parameters and buffers one at a time, and return a digest of each by name.

    Every rank of the default group has to call it. A full tensor is on each rank only until the next one.

    Args:
        model: A model whose parameters may be sharded.

    Returns:
        `parameter` or `buffer`, dtype, shape and sha256 by name; for the later names of a tied tensor, the
        first one. On ranks other than 0 the sharded parameters are left out.

    Raises:
        LeftOnMetaError: A tensor has no values.
        RankMismatchError: A tensor that each rank holds whole is not the same on all of them.
    """
    digests: dict[str, str] = {}
    held_whole: dict[str, str] = {}
    first_names: dict[int, str] = {}
    named = itertools.chain(
        (("parameter", *item) for item in model.named_parameters(remove_duplicate=False)),
        (("buffer", *item) for item in model.named_buffers(remove_duplicate=False)),
    )
    for kind, fqn, tensor in named:
        name = clean_fqn(fqn)
        if tensor.is_meta:
            raise LeftOnMetaError(
                f"{name}: expected values after wrap_model, got a {kind} on the meta device."
            )
        first = first_names.setdefault(id(tensor), name)
        if first != name:
            digests[name] = f"{kind}{_TIED_TO}{first}"
        elif isinstance(tensor, DTensor):
            full = tensor.full_tensor()
            if dist.get_rank() == 0:
                digests[name] = f"{kind} {tensor_digest(full)}"
        else:
            digests[name] = held_whole[name] = f"{kind} {tensor_digest(tensor)}"
    check_same_on_all_ranks(held_whole)
    return digests


def check_same_on_all_ranks(digests: Mapping[str, str]) -> None:
    """Refuse digests that are not the same on every rank of the default group.

    Raises:
        RankMismatchError: With the names that differ, on every rank.
    """
    gathered: list[Mapping[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, dict(digests))
    for rank, other in enumerate(gathered):
        if names := differing_names(gathered[0], other):
            raise RankMismatchError(
                f"{listed(names)}: expected the same values on every rank, got others on rank {rank} than on "
                "rank 0. What is not sharded has to be equal on all ranks."
            )


def is_tie(digest: str) -> bool:
    """Return whether a digest only says which other name the tensor has."""
    return _TIED_TO in digest


def whole_digest(digests: Mapping[str, str]) -> str:
    """Return one sha256 over all names and digests."""
    lines = (f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def differing_names(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Return the names whose digests differ, or that are in one of the two only."""
    return sorted(name for name in {**one, **other} if one.get(name) != other.get(name))
