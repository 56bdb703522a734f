"""A process group for one call, through torch's private constructor; the only file that uses it.

`dist.new_group` needs either every rank of the job, or (with `use_local_synchronization`) names a group by its ranks and the
number of groups that are alive: a second call would meet the first one's addresses in the store. So the group gets a name
here that no other one has.

Where the job was set up with `init_process_group(device_id=...)`, the constructor splits the default group's communicator
(`ncclCommSplit`), and that needs every rank of the job, also those outside of the new group, to take part
(`perform_nocolor_split`). They are not in the call. So the default group's `bound_device_id`, by which the constructor
decides, is out of sight while ours is made, and ours meets through the store.

Source: `_new_process_group_helper` and `_get_split_source` in torch/distributed/distributed_c10d.py, torch 2.11 to 2.13.
`tests/distributed/test_data_plane.py` watches what is used here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

_LONG = timedelta(days=100)


def make_group(
    ranks: Sequence[int], *, rank: int, backend: str, name: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Make a group. All of its ranks call this together, and no others.

    Args:
        ranks: Global ranks, in the order of the group.
        rank: This one.
        backend: Of torch.
        name: That no other group of the job ever had.
        timeout: Of its set-up and of its collectives.
    """
    c10d = dist.distributed_c10d
    with _unbound_default_group():
        group, _ = c10d._new_process_group_helper(
            len(ranks),
            list(ranks).index(rank),
            list(ranks),
            dist.Backend(backend),
            # A connection of its own: over one that others use too, they could ask nothing while torch waits for a rank.
            c10d._get_default_store().clone(),  # type: ignore[attr-defined]
            name,  # type: ignore[arg-type]
            timeout=timeout,
            group_desc="shardwise data plane",
        )
    c10d._world.pg_group_ranks[group] = {member: index for index, member in enumerate(ranks)}
    made: dist.ProcessGroup = group
    return made


def let_collectives_take_long(group: dist.ProcessGroup) -> None:
    """Leave it to the caller how long a collective may take.

    A back end gives a collective up, and NCCL's ends the process, when it is not over after the group's timeout: also where the rank
    that it waits for has read on and on before it came to it.

    Source: `_set_pg_timeout` in torch/distributed/distributed_c10d.py.
    """
    for device in group._device_types:
        with suppress(AttributeError, RuntimeError):  # not every back end can
            group._get_backend(device)._set_default_timeout(_LONG)


@contextmanager
def _unbound_default_group() -> Iterator[None]:
    default = dist.distributed_c10d._get_default_group()
    bound = default.bound_device_id
    if bound is None:
        yield
        return
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = bound
