"""Which dim of a parameter FSDP2 shards where the caller did not say: dim 0, unless its padding would be memory for nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from torch import nn
from torch.distributed.tensor import Shard

from shardwise.materialization import Entry

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
        more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
        _log.info(
            "%d parameters are not sharded on dim 0, whose rows %d ranks would have to pad: %s%s. "
            "fsdp_config['shard_placement_fn'] decides otherwise.",
            len(moved),
            shard_ranks,
            "; ".join(moved[:3]),
            more,
        )
