"""Values for parameters that no checkpoint holds, the same for any number of ranks.

A module's own initialisation needs the whole tensor and draws from the process's random numbers. So each module that
owns such parameters runs on whole host tensors, one module at a time, from a seed that depends on its name alone; every
rank keeps its part. The price is one copy of the largest module's parameters in host memory, of those that it owns itself
and that are wanted, and the same work on every rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import nn

from shardwise.errors import CheckpointError, listed
from shardwise.materialization.foreseen import uninitialised
from shardwise.materialization.load import layout_of
from shardwise.materialization.names import original_of
from shardwise.materialization.rerun import make_again, owners_of
from shardwise.materialization.rules import initialising_rules
from shardwise.materialization.storage import local_of
from shardwise.materialization.structure import Entry, entries_of


def refuse_uninitialisable(model: nn.Module, absent: Collection[str]) -> None:
    """Raise, before anything is allocated, if a parameter starts from values that are not there yet, or from none.

    Args:
        model: Sharded or not.
        absent: Fqns of parameters that would be initialised.

    Raises:
        ConfigurationError: Naming the parameter.
        CheckpointError: Listing parameters that nothing initialises.
    """
    rules_of = partial(initialising_rules, model)
    wanted = _wanted(model, absent)
    for fqn, names in owners_of(model, wanted):
        rules_of(fqn, names)
    if wanted:
        _refuse(uninitialised(model, wanted, rules_of=rules_of))


def initialise(
    model: nn.Module,
    absent: Collection[str],
    *,
    ranks: Sequence[int],
    rank: int,
    seed: int,
    step: Callable[[], None],
) -> tuple[str, ...]:
    """Give parameters that have storage and no values those that their module starts with.

    Args:
        model: Sharded or not.
        absent: Fqns of the parameters.
        ranks: Global ranks of the call.
        rank: This one.
        seed: Equal on all ranks.
        step: Called after each tensor.

    Returns:
        Fqns of those that got values.

    Raises:
        CheckpointError: Listing parameters that nothing initialises.
        ModelError: A module's initialisation failed.
    """

    def keep_own_part(entry: Entry, whole: torch.Tensor) -> None:
        shard = local_of(entry.tensor)
        with torch.no_grad():
            for part in layout_of(entry.tensor, ranks).parts(tuple(whole.shape), rank):
                shard[part.local.slices()].copy_(whole[part.region.slices()])
        step()

    wanted = _wanted(model, absent)
    module_of = _first_modules(model)

    def owner_of(fqn: str) -> str:
        original = original_of(fqn)  # whose values a trainable copy has
        return fqn if original == fqn else module_of.get(original, original)

    left = make_again(
        model,
        wanted,
        rules_of=partial(initialising_rules, model),
        seed_of=lambda owner: _seed_of(seed, owner_of(owner)),
        place=keep_own_part,
    )
    _refuse(left)
    return tuple(entry.fqn for entry in wanted)


def _refuse(left: Sequence[Entry]) -> None:
    if left:
        raise CheckpointError(
            f"expected a value for every parameter, got none for {listed([entry.fqn for entry in left])}: no checkpoint holds "
            "them, and their module does not initialise them. Give it a reset_parameters method that writes all of its "
            "parameters from torch's random numbers; or build the model with values, as from_config of its class does, and wrap that."
        )


def _wanted(model: nn.Module, absent: Collection[str]) -> list[Entry]:
    if not absent:
        return []
    return [entry for entry in entries_of(model, roles=("parameter",)) if entry.fqn in absent]


def _first_modules(model: nn.Module) -> dict[str, str]:
    """Return the module by which a parameter is initialised, for each module that has it, by fqn."""
    modules: dict[str, str] = {}
    for entry in entries_of(model, roles=("parameter",)):
        for slot in entry.slots:
            modules.setdefault(slot.fqn.rpartition(".")[0], entry.fqn.rpartition(".")[0])
    return modules


def _seed_of(seed: int, fqn: str) -> int:
    digest = hashlib.sha256(f"{seed} {fqn}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
