"""Values for parameters that no checkpoint holds, the same for any number of ranks.

A module's own initialisation needs the whole tensor and draws from the process's random numbers. So each module that
owns such parameters runs on whole host tensors, one module at a time, from a seed that depends on its name alone; every
rank keeps its part. The price is the largest module's parameters in host memory, and the same work on every rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import torch
from torch import nn

from shardwise.errors import CheckpointError
from shardwise.materialization.binding import listed
from shardwise.materialization.load import layout_of
from shardwise.materialization.rerun import made_by_modules
from shardwise.materialization.storage import local_of
from shardwise.materialization.structure import entries_of


def initialise(
    model: nn.Module, absent: Collection[str], *, ranks: Sequence[int], rank: int, seed: int
) -> None:
    """Give parameters that have storage and no values those that their module starts with.

    Args:
        model: Sharded or not.
        absent: Fqns of the parameters.
        ranks: Global ranks of the call.
        rank: This one.
        seed: Equal on all ranks.

    Raises:
        CheckpointError: Listing parameters that their module does not initialise.
    """
    wanted = (entry for entry in entries_of(model) if entry.role == "parameter" and entry.fqn in absent)
    left: list[str] = []
    for entry, whole in made_by_modules(
        model, wanted, buffers_only=False, seed_of=lambda fqn: _seed_of(seed, fqn)
    ):
        if whole is None:
            left.append(entry.fqn)
        else:
            _keep_own_part(entry.tensor, whole, ranks, rank)
    if left:
        raise CheckpointError(
            f"expected a value for every parameter, got none for {listed(left)}: no checkpoint holds them, and their module "
            "does not initialise them. Give it a reset_parameters method that writes all of its parameters, or build "
            "them with values."
        )


def _seed_of(seed: int, fqn: str) -> int:
    digest = hashlib.sha256(f"{seed} {fqn}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _keep_own_part(parameter: torch.Tensor, whole: torch.Tensor, ranks: Sequence[int], rank: int) -> None:
    shard = local_of(parameter)
    with torch.no_grad():
        for part in layout_of(parameter, ranks).parts(tuple(whole.shape), rank):
            shard[part.local.slices()].copy_(whole[part.region.slices()])
