"""shardwise's own process group for tensor bytes, and bounded waits on it.

The user's mesh groups never carry our data: a failure in the middle of a transfer leaves a group unusable. Ours is
made for one call and dropped after it.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from shardwise.errors import RankError, RankTimeoutError
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.call_keys import name_of
from shardwise.materialization.device import current
from shardwise.materialization.own_group import let_collectives_take_long, make_group
from shardwise.materialization.patience import Patience
from shardwise.materialization.rank_errors import listed_ranks
from shardwise.materialization.reader_threads import ReaderThreads

_SECONDS_FOR_THE_CAUSE = 3.0
_SECONDS_BETWEEN_CHECKS = 0.25
_SECONDS_TO_DISCONNECT = 1.0
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

    def close(self) -> None:
        """Let go of the group; the plane is of no use afterwards."""
        del self.group

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
        patience = Patience(self._agreement)
        pause = _SHORTEST_PAUSE_SECONDS
        while not work.is_completed():
            self._agreement.check()
            if patience.is_over():
                raise RankTimeoutError(
                    f"rank {self._agreement.rank}: {what} did not complete, and no rank made a step for "
                    f"{self._agreement.timeout_seconds:g} s. Check the other ranks' logs and the network between "
                    "the ranks, or pass a longer timeout."
                )
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE_SECONDS, pause * 1.5)
        self._agreement.step()
        try:
            work.wait()
        except RuntimeError as error:
            # A rank that failed closes its connections a moment before it says why; of a killed one the rank next to it says so.
            self._agreement.hear(within_seconds=_SECONDS_FOR_THE_CAUSE)
            raise RankError(
                f"rank {self._agreement.rank}: {what} broke off: {error}. A rank has ended or lost its connection: look for the "
                "first error in the ranks' logs, and for the kernel's out-of-memory killer."
            ) from error


@contextmanager
def open_data_plane(
    ranks: Sequence[int], *, device: torch.device, agreement: Agreement
) -> Iterator[DataPlane]:
    """Make a group for one call; drop it in the end, aborting what is in flight if the call failed.

    All of its ranks call this at one place, right after they have left a phase together.

    Args:
        ranks: Global ranks of the group, this one among them.
        device: The mesh's device on this rank.
        agreement: Of the call; a phase of it is open.

    Raises:
        PeerError: Another rank failed.
        RankError: The ranks cannot connect.
    """
    backend = _backend_of(device)
    # A call may have several planes: two of one name would meet each other's addresses in the store.
    name = agreement.numbered(f"data {name_of(ranks)}")
    timeout = timedelta(seconds=agreement.timeout_seconds)
    buffers_on = torch.device("cpu") if backend == dist.Backend.GLOO else device
    make = partial(make_group, ranks, rank=agreement.rank, backend=backend, name=name, timeout=timeout)
    try:
        group, connection = _made_on_thread(lambda: _connecting(make, buffers_on), agreement)
    except (RuntimeError, ValueError) as error:
        # A rank that fails as soon as it has the group closes its connections while others still make theirs.
        agreement.hear(within_seconds=_SECONDS_FOR_THE_CAUSE)
        raise RankError(
            f"rank {agreement.rank}: expected a {backend} group over ranks {listed_ranks(ranks)}, got {error}. Check the network "
            "between the ranks (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), and the other ranks' logs."
        ) from error
    plane = DataPlane(group, device=buffers_on, agreement=agreement)
    last = [group]
    del group
    try:
        # gloo connects rank by rank: one that has nothing to send could leave before another has all its connections.
        plane.wait(connection, what="the connection of all ranks")
        del connection
        yield plane
    except BaseException as error:
        agreement.tell(error)  # a closed connection says less, and closing may take its time
        last[0].abort()
        # gloo closes a group's connections when the last reference to it, or to a transfer on it, goes, and a peer that waits
        # for this rank's data learns of it only then. The frames of an error's traceback would keep the references.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        dist.destroy_process_group(last[0])
        plane.close()
        _let_go(last)


def _let_go(last: list[dist.ProcessGroup]) -> None:
    """Let go of the last reference to a group.

    gloo then waits for its own threads, and one that waits for a rank which is busy or stopped ends only when that rank lets go too.
    """
    thread = threading.Thread(target=last.clear, name="shardwise-disconnect", daemon=True)
    thread.start()
    thread.join(timeout=_SECONDS_TO_DISCONNECT)


def _connecting(
    make: Callable[[], dist.ProcessGroup], device: torch.device
) -> tuple[dist.ProcessGroup, dist.Work]:
    """Make a group and begin its first collective. gloo connects in the one, NCCL in the other; both block until all ranks are there."""
    with current(device):  # which is not that of another thread
        group = make()
        let_collectives_take_long(group)  # `DataPlane.wait` has more patience, as long as anything moves
        one = torch.zeros(1, dtype=torch.uint8, device=device)
        try:
            work: dist.Work = dist.all_reduce(one, group=group, async_op=True)
        except BaseException:
            dist.destroy_process_group(group)
            raise
        return group, work


def _made_on_thread(
    make: Callable[[], tuple[dist.ProcessGroup, dist.Work]], agreement: Agreement
) -> tuple[dist.ProcessGroup, dist.Work]:
    """Make a group while this rank listens to the others."""
    threads = ReaderThreads(1, name="shardwise-connect")
    future = threads.submit(make)
    try:
        while not wait([future], timeout=_SECONDS_BETWEEN_CHECKS).done:
            agreement.check()
        return future.result()
    except BaseException:
        future.add_done_callback(_drop)  # it may be made yet, when nobody wants it any more
        raise
    finally:
        threads.close(within_seconds=0.0)


def _drop(future: Future[tuple[dist.ProcessGroup, dist.Work]]) -> None:
    if future.cancelled() or future.exception() is not None:
        return
    with suppress(RuntimeError, ValueError):  # the job may have ended its groups meanwhile
        group, _ = future.result()
        group.abort()
        dist.destroy_process_group(group)


def _backend_of(device: torch.device) -> str:
    # "cpu:gloo,cuda:nccl" names a backend per device type; a job whose accelerators talk through gloo keeps to it.
    pairs = dict(pair.split(":", 1) for pair in dist.get_backend_config().split(","))
    return pairs.get(device.type, dist.Backend.GLOO)
