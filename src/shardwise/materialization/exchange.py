"""Execute an exchange: in each round this rank hands out one slice and every rank gets its pieces of all slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from shardwise.materialization.awaited_source import AwaitedSource
from shardwise.materialization.data_plane import DataPlane
from shardwise.materialization.placing import elements_in, packed_in, place_in
from shardwise.materialization.read_ahead import GrowingBuffer, ReadAhead
from shardwise.plan import ExchangePlan, Round, Transfer


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
        device = plane.device if plane is not None else torch.device("cpu")
        self._pinned = device.type != "cpu"
        most_sent, most_received = plan.slices.most_sent_bytes, plan.slices.most_received_bytes
        self._send = GrowingBuffer(torch.device("cpu"), pinned=self._pinned, expected_bytes=most_sent)
        self._receive = GrowingBuffer(
            device, pinned=False, expected_bytes=min(most_received, plan.network_bytes)
        )

    def run(self) -> None:
        """Read, exchange and place everything.

        Raises:
            CheckpointError: A read failed.
            PeerError: Another rank failed.
        """
        nothing = torch.empty(0, dtype=torch.uint8)
        ahead = ReadAhead(
            list(self._plan.extents()), source=self._source, pinned=self._pinned, done=self._done
        )
        for number, turn in enumerate(self._plan.rounds(), start=1):
            content = ahead.content_of(turn.read) if turn.read is not None else nothing
            self._run_round(turn, content, what=f"round {number} of {len(self._plan)} of the exchange")

    def _run_round(self, turn: Round, content: torch.Tensor, *, what: str) -> None:
        receive = self._receive.first(sum(turn.receive_bytes))
        work = None
        if self._plane is not None:
            send = self._send.first(sum(turn.send_bytes))
            self._pack(turn, content, send)
            work = self._plane.all_to_all(
                receive,
                send.to(self._plane.device),
                receive_bytes=turn.receive_bytes,
                send_bytes=turn.send_bytes,
            )
        for transfer in turn.kept:  # while the messages travel
            elements = elements_in(content, transfer.slice_offset, transfer.dtype, transfer.piece)
            self._place(transfer, elements)
        if self._plane is not None and work is not None:
            self._plane.wait(work, what=what)
            self._unpack(turn, receive)

    @staticmethod
    def _pack(turn: Round, content: torch.Tensor, send: torch.Tensor) -> None:
        for offset, transfer in placed(turn.outgoing, turn.send_bytes):
            packed = packed_in(send, offset, transfer.dtype, transfer.piece)
            packed.copy_(elements_in(content, transfer.slice_offset, transfer.dtype, transfer.piece))

    def _unpack(self, turn: Round, receive: torch.Tensor) -> None:
        for offset, transfer in placed(turn.incoming, turn.receive_bytes):
            self._place(transfer, packed_in(receive, offset, transfer.dtype, transfer.piece))

    def _place(self, transfer: Transfer, elements: torch.Tensor) -> None:
        with torch.no_grad():
            place_in(self._targets[transfer.fqn], transfer.piece).copy_(elements)


def placed(messages: Sequence[Sequence[Transfer]], lengths: Sequence[int]) -> Iterator[tuple[int, Transfer]]:
    """Yield each transfer and where it stands in the messages of all ranks, one after the other, in bytes."""
    base = 0
    for message, length in zip(messages, lengths, strict=True):
        for transfer in message:
            yield base + transfer.message_offset, transfer
        base += length
