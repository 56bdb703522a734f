"""shardwise's own process group for tensor bytes, and bounded waits on it.

The user's mesh groups never carry our data: a failure in the middle of a transfer leaves a group unusable. Ours is
made for one call and dropped after it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from shardwise.errors import RankError, RankTimeoutError
from shardwise.materialization.agreement import Agreement

_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.0001, 0.002


class DataPlane:
    """A process group over the ranks of one call, on the backend that the mesh's device uses.

    Args:
        group: Made for this call.
        device: Where the backend wants its buffers: the mesh's device, or the CPU under gloo.
        agreement: Of the call; asked for failures of other ranks while data is awaited.
    """

    def __init__(self, group: dist.ProcessGroup, *, device: torch.device, agreement: Agreement) -> None:
        self.group = group
        self.device = device
        self._agreement = agreement

    def scatter(
        self, into: torch.Tensor, slots: Sequence[torch.Tensor] | None, *, source_rank: int
    ) -> dist.Work:
        """Start sending one slot to each rank.

        Args:
            into: uint8, this rank's slot, on `device`.
            slots: On the source rank, one per rank in group order, each as large as `into`; None elsewhere.
            source_rank: Global rank.
        """
        work: dist.Work = dist.scatter(
            into,
            list(slots) if slots is not None else None,
            src=source_rank,
            group=self.group,
            async_op=True,
        )
        return work

    def all_to_all(
        self,
        receive: torch.Tensor,
        send: torch.Tensor,
        *,
        receive_bytes: Sequence[int],
        send_bytes: Sequence[int],
    ) -> dist.Work:
        """Start sending one message to each rank and receiving one from each.

        Args:
            receive: uint8, on `device`; the messages to this rank one after the other, in group order.
            send: uint8, on `device`; the messages from this rank.
            receive_bytes: Length of each message to this rank.
            send_bytes: Length of each message from this rank.
        """
        work: dist.Work = dist.all_to_all_single(
            receive, send, list(receive_bytes), list(send_bytes), group=self.group, async_op=True
        )
        return work

    def wait(self, work: dist.Work, *, what: str) -> None:
        """Wait until a transfer is complete, another rank fails, or nothing moves for the timeout.

        Raises:
            PeerError: Another rank failed.
            RankTimeoutError: The transfer did not complete in time.
            RankError: The transfer broke off.
        """
        started = time.monotonic()
        pause = _SHORTEST_PAUSE_SECONDS
        while not work.is_completed():
            self._agreement.check()
            if time.monotonic() - started > self._agreement.timeout_seconds:
                raise RankTimeoutError(
                    f"rank {self._agreement.rank}: {what} did not complete within "
                    f"{self._agreement.timeout_seconds:g} s. Check the other ranks' logs and the network between "
                    "the ranks, or pass a longer timeout."
                )
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE_SECONDS, pause * 1.5)
        try:
            work.wait()
        except RuntimeError as error:
            self._agreement.check(now=True)  # a rank that failed says why; a killed one cannot
            raise RankError(
                f"rank {self._agreement.rank}: {what} broke off: {error}. A rank has ended or lost its connection: "
                "look for the first error in the ranks' logs, and for the kernel's out-of-memory killer."
            ) from error


@contextmanager
def open_data_plane(
    ranks: Sequence[int], *, device: torch.device, agreement: Agreement
) -> Iterator[DataPlane]:
    """Make a group for one call; drop it in the end, aborting what is in flight if the call failed.

    Args:
        ranks: Global ranks of the call.
        device: The mesh's device on this rank.
        agreement: Of the call.
    """
    backend = _backend_of(device)
    group = _new_group(ranks, backend, agreement)
    try:
        buffers_on = torch.device("cpu") if backend == dist.Backend.GLOO else device
        yield DataPlane(group, device=buffers_on, agreement=agreement)
    except BaseException:
        group.abort()
        raise
    finally:
        dist.destroy_process_group(group)


def _new_group(ranks: Sequence[int], backend: str, agreement: Agreement) -> dist.ProcessGroup:
    # `dist.new_group` needs either every rank of the job, or (use_local_synchronization) names a group by its ranks and
    # the number of groups that are alive: a second call would meet the first one's addresses in the store. So the
    # group gets a name here that no other call has. Source: torch.distributed.distributed_c10d.new_group (torch 2.13).
    c10d = dist.distributed_c10d
    group, _ = c10d._new_process_group_helper(
        len(ranks),
        list(ranks).index(agreement.rank),
        list(ranks),
        dist.Backend(backend),
        c10d._get_default_store(),
        f"{agreement.name}/data",  # type: ignore[arg-type]
        timeout=timedelta(seconds=agreement.timeout_seconds),
        group_desc="shardwise data plane",
    )
    c10d._world.pg_group_ranks[group] = {rank: index for index, rank in enumerate(ranks)}
    made: dist.ProcessGroup = group
    return made


def _backend_of(device: torch.device) -> str:
    # "cpu:gloo,cuda:nccl" names a backend per device type; a job whose accelerators talk through gloo keeps to it.
    pairs = dict(pair.split(":", 1) for pair in dist.get_backend_config().split(","))
    return pairs.get(device.type, dist.Backend.GLOO)
