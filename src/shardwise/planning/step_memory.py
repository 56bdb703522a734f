"""How much of a model FSDP2 has gathered at a time, over the forward and backward of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitBytes:
    """Of one of FSDP2's units, on one rank.

    Args:
        gathered_bytes: Of its gathered parameters, in the compute dtype.
        gradient_bytes: Of its whole gradients, in the compute dtype.
        reduced_bytes: Of the buffer from which these are reduced, in the reduce dtype.
        keep_gathered: Whether its parameters stay gathered between its forward and its backward.
    """

    gathered_bytes: int
    gradient_bytes: int
    reduced_bytes: int
    keep_gathered: bool


def most_gathered_bytes(units: Sequence[UnitBytes], *, shard_ranks: int, copies_to_reduce: bool) -> int:
    """Return the most bytes of gathered parameters, whole gradients and buffers that a rank holds at a time, beside its shards.

    Source: torch 2.13, `torch/distributed/fsdp/_fully_shard`. `foreach_all_gather` receives a unit into a buffer and
    `foreach_all_gather_copy_out` copies it into the parameters; in a forward `wait_for_unshard` keeps the buffer until the next
    unit is copied out, in a backward it is freed at once, and `pre_backward` then gathers the next unit before this one
    computes. `post_backward` frees the parameters and the buffer of the last reduction (one is kept,
    `reduce_scatter_max_input_buffers`), and `foreach_reduce` copies the gradients into a buffer of the reduce dtype, from which
    a shard is reduced into another one; a unit's last gradient is still there, for which all of them are taken here. With one shard
    rank there are no buffers to receive, and no gradient stays. gloo reduces a copy of the buffer.

    Left out: activations; the copy of a shard in the compute dtype, which is 1/N of a unit; second copies of what is sharded on
    another dim than 0; what an allocator keeps of freed blocks.

    Args:
        units: In the order of a forward.
        shard_ranks: Ranks over which parameters are sharded.
        copies_to_reduce: Whether the collective reduces a copy of its input, as gloo's does.
    """
    copies_to_reduce = copies_to_reduce and shard_ranks > 1
    received = [unit.gathered_bytes if shard_ranks > 1 else 0 for unit in units]
    most = kept = before = 0
    for unit, buffer in zip(units, received, strict=True):
        most = max(most, kept + before + buffer, kept + buffer + unit.gathered_bytes)
        kept += unit.gathered_bytes if unit.keep_gathered else 0
        before = buffer
    reducing = 0  # the buffer from which the unit behind this one is being reduced
    for number in range(len(units) - 1, -1, -1):
        unit = units[number]
        gathered = 0 if unit.keep_gathered else unit.gathered_bytes
        most = max(most, kept + reducing + gathered + (received[number] if gathered else 0))
        is_next_gathered = number == 0 or units[number - 1].keep_gathered
        prefetched = 0 if is_next_gathered else received[number - 1]
        most = max(most, kept + reducing + gathered + prefetched + unit.gradient_bytes)
        kept -= unit.gathered_bytes - gathered
        reducing = unit.reduced_bytes
        result = reducing // shard_ranks + (reducing if copies_to_reduce else 0)
        left = unit.gradient_bytes if shard_ranks > 1 else 0
        most = max(most, kept + prefetched + reducing + max(unit.gradient_bytes, left + result))
    return most
