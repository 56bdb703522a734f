"""Which dim of a parameter FSDP2 shards where the caller did not say: dim 0, unless its padding would be memory for nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from torch import nn
from torch.distributed.tensor import Shard

from shardwise.errors import ConfigurationError, shortened
from shardwise.materialization import Entry
from shardwise.strategies.fsdp_config import FSDPConfig

_log = logging.getLogger("shardwise")

_MOST_PADDED = 1.25
"""Up to this many times a parameter's size dim 0 is kept: shards of rows are one run of bytes in a file."""


def thrifty_dim(shape: tuple[int, ...], shard_ranks: int) -> int:
    """Return the dim of a parameter to shard.

    FSDP2 pads every rank's rows to those of the first rank: of a stack of 4 experts each of 8 ranks would keep one. Matrices and
    vectors stay at dim 0, since what could be saved on them is small against the stacks.

    Args:
        shape: Of the parameter, in elements.
        shard_ranks: Ranks that it is sharded over.

    Returns:
        0, or the first later dim that the ranks divide: FSDP2 takes no other.
    """
    if len(shape) < 3 or 0 in shape:
        return 0
    padded = -(-shape[0] // shard_ranks) * shard_ranks
    if padded < _MOST_PADDED * shape[0]:
        return 0
    return next((dim for dim, size in enumerate(shape) if dim > 0 and size % shard_ranks == 0), 0)


def keeps_a_part(reshard: bool | int | None, *, shard_ranks: int) -> bool:
    """Return whether gathered parameters are kept over fewer ranks after a forward than they are sharded over.

    Args:
        reshard: FSDP2's `reshard_after_forward`, to which 1 is False and the number of ranks True.
        shard_ranks: Ranks that parameters are sharded over.
    """
    return isinstance(reshard, int) and not isinstance(reshard, bool) and 1 < reshard < shard_ranks


def refuse_reshard(
    entries: Collection[Entry], ignored: Collection[nn.Parameter], config: FSDPConfig, *, shard_ranks: int
) -> None:
    """Raise where `reshard_after_forward` is a number that torch cannot use.

    What is kept over fewer ranks torch (2.13) cuts as rows, whatever its dim, and the next gathering of another dim fails with
    an IndexError; see `to_sharded_post_forward` in torch/distributed/fsdp/_fully_shard/_fsdp_param.py.

    Args:
        entries: Of the model, before it is sharded.
        ignored: Parameters that are not sharded.
        config: Of the strategy.
        shard_ranks: Ranks that the others are sharded over.

    Raises:
        ConfigurationError: It does not divide the ranks, or a parameter is sharded on another dim than 0.
    """
    reshard = config.reshard
    if not isinstance(reshard, int) or isinstance(reshard, bool):
        return
    if reshard < 1 or shard_ranks % reshard:
        raise ConfigurationError(
            f"fsdp_config['reshard_after_forward']: expected a number that divides the {shard_ranks} ranks that parameters are "
            f"sharded over, True or False, got {reshard}."
        )
    if config.shard_placement_fn is None or not keeps_a_part(reshard, shard_ranks=shard_ranks):
        return
    for entry in entries:
        if not isinstance(entry.tensor, nn.Parameter) or entry.tensor in ignored:
            continue
        found = config.shard_placement_fn(entry.tensor)
        placement = getattr(found, "placement", found)  # of a ShardPlacementResult
        if isinstance(placement, Shard) and placement.dim % max(1, entry.tensor.ndim):
            raise ConfigurationError(
                f"fsdp_config: reshard_after_forward={reshard} keeps gathered parameters over {reshard} of {shard_ranks} ranks, which "
                f"torch does for shards on dim 0 only; shard_placement_fn puts {entry.fqn} on dim {placement.dim}. Use "
                "reshard_after_forward=True or False, or leave that parameter on dim 0."
            )


def placement_lines(
    entries: Collection[Entry], ignored: Collection[nn.Parameter], config: FSDPConfig
) -> list[str]:
    """Return where the caller's function cuts each parameter, for ranks to compare: FSDP2 would gather a mixture of rows and columns.

    Args:
        entries: Of the model, before it is sharded.
        ignored: Parameters that are not sharded.
        config: Of the strategy.
    """
    decide = config.shard_placement_fn
    if decide is None:
        return []
    lines = []
    for entry in entries:
        if isinstance(entry.tensor, nn.Parameter) and entry.tensor not in ignored:
            found = decide(entry.tensor)
            # Of a ShardPlacementResult; its mesh has no text that ranks could compare.
            lines.append(f"shard_placement_fn {entry.fqn}: {getattr(found, 'placement', found)}")
    return lines


def thrifty_placement(shard_ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """Return a `shard_placement_fn` of `fully_shard` that shards each parameter on its `thrifty_dim`.

    Args:
        shard_ranks: Ranks that parameters are sharded over.
    """

    def placement(parameter: nn.Parameter) -> Shard | None:
        dim = thrifty_dim(tuple(parameter.shape), shard_ranks)
        return Shard(dim) if dim > 0 else None

    return placement


def log_placements(
    entries: Collection[Entry], ignored: Collection[nn.Parameter], *, shard_ranks: int
) -> None:
    """Say in the log which parameters `thrifty_placement` shards on another dim than 0.

    Args:
        entries: Of the model, before it is sharded.
        ignored: Parameters that are not sharded.
        shard_ranks: Ranks that the others are sharded over.
    """
    moved: list[str] = []
    for entry in entries:
        if entry.role == "parameter" and entry.tensor not in ignored:
            dim = thrifty_dim(tuple(entry.tensor.shape), shard_ranks)
            if dim > 0:
                moved.append(f"{entry.fqn} {tuple(entry.tensor.shape)} on dim {dim}")
    if moved:
        _log.info(
            "%d parameters are not sharded on dim 0, whose rows %d ranks would have to pad: %s. "
            "fsdp_config['shard_placement_fn'] decides otherwise.",
            len(moved),
            shard_ranks,
            shortened(moved, most=3, between="; "),
        )
