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
from shardwise.materialization.rerun import made_again, own_rerun
from shardwise.materialization.storage import local_of
from shardwise.materialization.structure import Entry, entries_of


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
    by_module: dict[int, list[Entry]] = {}
    for entry in entries_of(model):
        if entry.role == "parameter" and entry.fqn in absent:
            by_module.setdefault(id(entry.slots[0].module), []).append(entry)
    fqn_of = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    left: list[str] = []
    for of_module in by_module.values():
        module = of_module[0].slots[0].module
        fqn = fqn_of[id(module)]
        rerun = own_rerun(model, fqn, buffers_only=False)
        if rerun is None:
            left += [entry.fqn for entry in of_module]
            continue
        names = {entry.slots[0].name: entry.tensor for entry in of_module}
        made, unwritten = made_again(module, names, rerun, seed=_seed_of(seed, fqn))
        for entry in of_module:
            name = entry.slots[0].name
            if name in unwritten:
                left.append(entry.fqn)
            else:
                _keep_own_part(entry.tensor, made[name], ranks, rank)
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
