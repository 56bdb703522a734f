"""Execute an exchange the other way round: in each round ranks send what they keep of the slices, and the writers get them whole."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Protocol

import torch

from shardwise.materialization.agreement import Agreement
from shardwise.materialization.awaited_call import Doing, await_call, calling_threads
from shardwise.materialization.data_plane import DataPlane
from shardwise.materialization.exchange import placed
from shardwise.materialization.placing import as_memory, elements_in, packed_in, place_in
from shardwise.materialization.read_ahead import GrowingBuffer
from shardwise.plan import ExchangePlan, Round, Transfer


class Sink(Protocol):
    """Where the bytes of slices go: files, or memory that stands for them."""

    def write(self, file: str, offset: int, parts: list[memoryview]) -> None:
        """Take bytes of a file, one part after the other, from an offset on."""


class Collecting:
    """One rank's part in all rounds.

    Args:
        plan: Of this rank; as many rounds on every rank. Its readers write.
        sink: Takes the slices that this rank writes.
        shards: This rank's shards by fqn.
        plane: Carries the messages; None where there is one rank.
        agreement: Of the call.
    """

    def __init__(
        self,
        plan: ExchangePlan,
        *,
        sink: Sink,
        shards: Mapping[str, torch.Tensor],
        plane: DataPlane | None,
        agreement: Agreement,
    ) -> None:
        self._plan = plan
        self._sink = sink
        self._shards = shards
        self._plane = plane
        self._agreement = agreement
        self.received_bytes = 0
        on = plane.device if plane is not None else torch.device("cpu")
        self._send = GrowingBuffer(on, expected_bytes=plan.buffer_bytes, pinned_for=None)
        self._receive = GrowingBuffer(on, expected_bytes=plan.buffer_bytes, pinned_for=None)
        self._content = tuple(
            GrowingBuffer(torch.device("cpu"), expected_bytes=plan.buffer_bytes, pinned_for=None)
            for _ in range(2)
        )
        self._pending: tuple[Future[None], str] | None = None

    def run(self) -> None:
        """Send, receive and write everything.

        Raises:
            CheckpointError: A write failed.
            PeerError: Another rank failed.
        """
        with calling_threads(1, name="shardwise-write") as threads:
            for number, turn in enumerate(self._plan.rounds(), start=1):
                content = self._run_round(turn, number)
                self._await_last()
                if turn.read is not None:
                    read, parts = turn.read, [as_memory(content)]
                    what = f"{read.file}: writing {len(parts[0]):,} bytes at byte {read.start:,}"
                    self._pending = threads.submit(self._sink.write, read.file, read.start, parts), what
            self._await_last()

    def _run_round(self, turn: Round, number: int) -> torch.Tensor:
        nbytes = turn.read.stop - turn.read.start if turn.read is not None else 0
        content = self._content[number % 2].first(nbytes)  # the other one is being written
        work = None
        receive = self._receive.first(sum(turn.send_bytes))
        if self._plane is not None:
            send = self._send.first(sum(turn.receive_bytes))
            for offset, transfer in placed(turn.incoming, turn.receive_bytes):
                packed = packed_in(send, offset, transfer.dtype, transfer.piece)
                packed.copy_(self._elements(transfer))
            work = self._plane.all_to_all(
                receive, send, receive_bytes=turn.send_bytes, send_bytes=turn.receive_bytes
            )
        for transfer in turn.kept:  # while the messages travel
            _in_slice(content, transfer).copy_(self._elements(transfer))
        if self._plane is not None and work is not None:
            self._plane.wait(work, what=f"round {number} of {len(self._plan)} of the exchange")
            self.received_bytes += sum(turn.send_bytes)
            for offset, transfer in placed(turn.outgoing, turn.send_bytes):
                packed = packed_in(receive, offset, transfer.dtype, transfer.piece)
                _in_slice(content, transfer).copy_(packed)
        return content

    def _elements(self, transfer: Transfer) -> torch.Tensor:
        return place_in(self._shards[transfer.fqn].detach(), transfer.piece)

    def _await_last(self) -> None:
        if self._pending is not None:
            await_call(self._pending[0], self._agreement, Doing(self._pending[1]))
            self._pending = None


def _in_slice(content: torch.Tensor, transfer: Transfer) -> torch.Tensor:
    return elements_in(content, transfer.slice_offset, transfer.dtype, transfer.piece)
