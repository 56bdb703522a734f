"""Execute an exchange: in each round this rank reads one slice and every rank gets its pieces of all slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from shardwise.checkpoint import Readable
from shardwise.materialization.data_plane import DataPlane
from shardwise.materialization.placing import as_memory, elements_in, packed_in, place_in
from shardwise.plan import ExchangePlan, Round, Transfer


class Exchange:
    """One rank's part in all rounds.

    Args:
        plan: Of this rank; as many rounds on every rank.
        source: Open.
        targets: This rank's shards by tensor name.
        plane: Carries the messages; None where there is one rank.
        done: Told the bytes of each slice read.
    """

    def __init__(
        self,
        plan: ExchangePlan,
        *,
        source: Readable,
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
        pinned = device.type != "cpu"
        self._slice = _Buffer(device=torch.device("cpu"), pinned=pinned)
        self._send = _Buffer(device=torch.device("cpu"), pinned=pinned)
        self._receive = _Buffer(device=device, pinned=False)

    def run(self) -> None:
        """Read, exchange and place everything.

        Raises:
            CheckpointError: A read failed.
            PeerError: Another rank failed.
        """
        for number, turn in enumerate(self._plan.rounds(), start=1):
            self._run_round(turn, what=f"round {number} of {len(self._plan)} of the exchange")

    def _run_round(self, turn: Round, *, what: str) -> None:
        slice_bytes = turn.read.nbytes if turn.read is not None else 0
        content = self._slice.first(slice_bytes)
        if turn.read is not None:
            self._source.read_into(turn.read.file, turn.read.start, as_memory(content))
            self._done(slice_bytes)
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
        base = 0
        for message, length in zip(turn.outgoing, turn.send_bytes, strict=True):
            for transfer in message:
                piece, dtype = transfer.piece, transfer.dtype
                packed = packed_in(send, base + transfer.message_offset, dtype, piece)
                packed.copy_(elements_in(content, transfer.slice_offset, dtype, piece))
            base += length

    def _unpack(self, turn: Round, receive: torch.Tensor) -> None:
        base = 0
        for message, length in zip(turn.incoming, turn.receive_bytes, strict=True):
            for transfer in message:
                packed = packed_in(receive, base + transfer.message_offset, transfer.dtype, transfer.piece)
                self._place(transfer, packed)
            base += length

    def _place(self, transfer: Transfer, elements: torch.Tensor) -> None:
        with torch.no_grad():
            place_in(self._targets[transfer.fqn], transfer.piece).copy_(elements)


class _Buffer:
    """Bytes that each round reuses; as large as the largest round so far.

    Args:
        device: Of the bytes.
        pinned: Whether they lie in pinned host memory.
    """

    def __init__(self, *, device: torch.device, pinned: bool) -> None:
        self._device = device
        self._pinned = pinned
        self._bytes = self._made(0)

    def first(self, nbytes: int) -> torch.Tensor:
        """Return the first bytes of it; what they hold is undefined."""
        if nbytes > len(self._bytes):
            self._bytes = self._made(0)  # the two never live together
            self._bytes = self._made(nbytes)
        return self._bytes[:nbytes]

    def _made(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned, device=self._device)
