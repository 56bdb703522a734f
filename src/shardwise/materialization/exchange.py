"""Execute an exchange: in each round this rank hands out one slice and every rank gets its pieces of all slices."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.distributed as dist

from shardwise.materialization.awaited_source import AwaitedSource
from shardwise.materialization.data_plane import DataPlane
from shardwise.materialization.device_placing import DevicePlacing, device_of_targets
from shardwise.materialization.landings import Landing
from shardwise.materialization.placing import elements_in, packed_in, place_in
from shardwise.materialization.read_ahead import GrowingBuffer, ReadAhead
from shardwise.plan import ExchangePlan, Round, Transfer

_SCRATCH_BYTES = 16 * 2**20
"""Of device memory, from which pieces are placed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _InFlight:
    """A round whose messages travel.

    Args:
        turn: The round.
        plane: That carries them.
        work: To wait for.
        send: What is sent, which must stay as it is.
        receive: Where the messages arrive.
        what: For messages.
    """

    turn: Round
    plane: DataPlane
    work: dist.Work
    send: torch.Tensor
    receive: torch.Tensor
    what: str


class Exchange:
    """One rank's part in all rounds.

    Args:
        plan: Of this rank; as many rounds on every rank.
        source: Open.
        targets: This rank's shards by tensor name.
        plane: Carries the messages; None where there is one rank.
        done: Told the bytes of each extent read.
    """

    def __init__(
        self,
        plan: ExchangePlan,
        *,
        source: AwaitedSource,
        targets: Mapping[str, torch.Tensor],
        plane: DataPlane | None,
        done: Callable[[int], None],
    ) -> None:
        self._plan = plan
        self._source = source
        self._targets = targets
        self._plane = plane
        self._done = done
        on = plane.device if plane is not None else torch.device("cpu")
        self._destination = device_of_targets(targets)
        most_sent, most_received = plan.slices.most_sent_bytes, plan.slices.most_received_bytes
        # Pinned for what reads it, which is the device that sends, or the one that is filled.
        reader = on if on.type != "cpu" else self._destination
        self._send = [
            GrowingBuffer(torch.device("cpu"), expected_bytes=most_sent, pinned_for=on)
            for _ in range(plan.rounds_in_flight)
        ]
        self._in_flight: deque[_InFlight] = deque()
        self._receive = GrowingBuffer(
            on,
            expected_bytes=min(most_received, plan.network_bytes),
            pinned_for=self._destination,
        )
        self._pinned_for = reader
        longest = int((plan.slices.stop - plan.slices.start).max(initial=0))
        self._scratch_bytes = min(_SCRATCH_BYTES, max(longest, most_received))
        self._placing: DevicePlacing | None = None

    def run(self) -> None:
        """Read, exchange and place everything.

        Raises:
            CheckpointError: A read failed.
            PeerError: Another rank failed.
        """
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        with ExitStack() as stack:
            for buffer in self._send:
                stack.callback(buffer.close)
            stack.callback(self._receive.close)
            ahead = ReadAhead(
                list(self._plan.extents()),
                source=self._source,
                pinned_for=self._pinned_for,
                done=self._done,
            )
            stack.callback(ahead.close)
            if self._destination.type != "cpu":
                # One stream: its work ends with each round, before the buffers are written again.
                self._placing = DevicePlacing(
                    self._targets, device=self._destination, lanes=1, scratch_bytes=self._scratch_bytes
                )
                stack.callback(self._placing.close)
            for number, turn in enumerate(self._plan.rounds(), start=1):
                content = ahead.content_of(turn.read) if turn.read is not None else nothing
                if self._plane is not None:
                    self._begin(turn, content, self._plane, number=number)
                kept = self._place_kept(turn, content)  # while the messages travel
                if len(self._in_flight) == len(self._send):
                    self._end_first()
                if kept is not None:
                    kept.synchronize()
            while self._in_flight:
                self._end_first()

    def _begin(self, turn: Round, content: torch.Tensor, plane: DataPlane, *, number: int) -> None:
        receive = self._receive.first(sum(turn.receive_bytes))
        packed = self._send[number % len(self._send)].first(sum(turn.send_bytes))
        self._pack(turn, content, packed)
        send = packed.to(plane.device)
        work = plane.all_to_all(receive, send, receive_bytes=turn.receive_bytes, send_bytes=turn.send_bytes)
        what = f"round {number} of {len(self._plan)} of the exchange"
        self._in_flight.append(
            _InFlight(turn=turn, plane=plane, work=work, send=send, receive=receive, what=what)
        )

    def _end_first(self) -> None:
        """Wait for the messages that have travelled longest, and place what has arrived."""
        first = self._in_flight.popleft()
        first.plane.wait(first.work, what=first.what)
        arrived = self._unpack(first.turn, first.receive)
        if arrived is not None:
            arrived.synchronize()

    @staticmethod
    def _pack(turn: Round, content: torch.Tensor, send: torch.Tensor) -> None:
        for offset, transfer in placed(turn.outgoing, turn.send_bytes):
            packed = packed_in(send, offset, transfer.dtype, transfer.piece)
            packed.copy_(elements_in(content, transfer.slice_offset, transfer.dtype, transfer.piece))

    def _place_kept(self, turn: Round, content: torch.Tensor) -> torch.Event | None:
        """Place what this rank reads for itself; return what is reached when `content` may be written again, or None: at once."""
        if self._placing is not None:
            kept = [_landing(each, each.slice_offset, is_packed=False) for each in turn.kept]
            return self._placing.place(content, kept)
        for transfer in turn.kept:
            elements = elements_in(content, transfer.slice_offset, transfer.dtype, transfer.piece)
            self._place(transfer, elements)
        return None

    def _unpack(self, turn: Round, receive: torch.Tensor) -> torch.Event | None:
        """Place what has arrived; return the same for `receive`."""
        arrived = placed(turn.incoming, turn.receive_bytes)
        if self._placing is None:
            for offset, transfer in arrived:
                self._place(transfer, packed_in(receive, offset, transfer.dtype, transfer.piece))
            return None
        landings = [_landing(each, offset, is_packed=True) for offset, each in arrived]
        if receive.device.type == "cpu":
            return self._placing.place(receive, landings)
        self._placing.place_from_device(receive, landings)
        return None

    def _place(self, transfer: Transfer, elements: torch.Tensor) -> None:
        with torch.no_grad():
            place_in(self._targets[transfer.fqn], transfer.piece).copy_(elements)


def _landing(transfer: Transfer, offset: int, *, is_packed: bool) -> Landing:
    return Landing(
        fqn=transfer.fqn, dtype=transfer.dtype, piece=transfer.piece, offset=offset, is_packed=is_packed
    )


def placed(messages: Sequence[Sequence[Transfer]], lengths: Sequence[int]) -> Iterator[tuple[int, Transfer]]:
    """Yield each transfer and where it stands in the messages of all ranks, one after the other, in bytes."""
    base = 0
    for message, length in zip(messages, lengths, strict=True):
        for transfer in message:
            yield base + transfer.message_offset, transfer
        base += length
