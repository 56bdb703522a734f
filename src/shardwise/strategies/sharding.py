"""`fully_shard` on every unit of a model, and on what is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardwise.materialization import device_of, entries_of, named_modules_of
from shardwise.strategies.mesh import source_rank_of
from shardwise.strategies.placement import keeps_a_part, log_placements, thrifty_placement
from shardwise.strategies.wrap_options import WrapOptions
from shardwise.strategies.wrapping import Unit, ignored_parameters


def shard_units(model: nn.Module, units: tuple[Unit, ...], options: WrapOptions) -> None:
    """Shard a model in place.

    Args:
        model: On meta, or with values on every rank; what FSDP2 ignores of it moves to the mesh's device.
        units: That are gathered each by itself.
        options: Of the strategy.
    """
    config = options.config
    entries = entries_of(model, roles=("parameter",))
    ignored = ignored_parameters(entries, config)
    for parameter in ignored:
        if not parameter.is_meta:  # FSDP2 moves what it manages, and leaves these where they are
            parameter.data = parameter.data.to(device_of(options.mesh))
    placement = config.shard_placement_fn
    shard_ranks = options.mesh.size(-1)
    if placement is None and not keeps_a_part(config.reshard, shard_ranks=shard_ranks):  # see refuse_reshard
        placement = thrifty_placement(shard_ranks)
        if dist.get_rank() == source_rank_of(options.mesh):
            log_placements(entries, ignored, shard_ranks=shard_ranks)
    del entries  # they hold the full tensors
    shard = partial(
        fully_shard,
        mesh=options.mesh,
        shard_placement_fn=placement,
        offload_policy=config.offload_policy,
        ignored_params=ignored,
    )
    for unit in units:
        modules = [model.get_submodule(fqn) for fqn in unit.fqns]
        reshard = False if unit.keep_gathered and config.reshard is None else config.reshard
        policy = options.policy
        if unit.own_dtype:
            policy = dataclasses.replace(policy, param_dtype=None, cast_forward_inputs=False)
        shard(modules if len(modules) > 1 else modules[0], reshard_after_forward=reshard, mp_policy=policy)
        _reduce_what_a_rank_has_not_used(modules)
    # What is left to the root is needed first in backward: FSDP2 then keeps it gathered unless told otherwise.
    reshard = None if isinstance(config.reshard, bool) else config.reshard
    shard(model, reshard_after_forward=reshard, mp_policy=options.policy)
    if not units:
        _reduce_what_a_rank_has_not_used([model])


def _reduce_what_a_rank_has_not_used(modules: Sequence[nn.Module]) -> None:
    """Let ranks reduce the same gradients of a unit though each has run other parts of it.

    Experts that are modules of their own, as on transformers 4.57, run only where a rank's tokens reach them. Without this ranks
    exchange buffers of different sizes, and gloo ends the process. Units without a list of modules keep "no gradient" for what
    was not used.
    """
    has_list = any(
        isinstance(inner, nn.ModuleList) for module in modules for _, inner in named_modules_of(module)
    )
    allow = getattr(modules[0], "set_reduce_scatter_unused_params", None)  # torch 2.13 has it
    if has_list and allow is not None:
        allow(True, recurse=False)
