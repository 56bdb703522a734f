"""Execute an exchange: in each round this rank reads one slice and every rank gets its pieces of all slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from shardwise.checkpoint import Source
from shardwise.materialization.data_plane import DataPlane
from shardwise.materialization.placing import as_memory, elements_in, packed_in, place_in
from shardwise.plan import Round, Transfer


class Exchange:
    """One rank's part in all rounds.

    Args:
        rounds: Of this rank; as many on every rank.
        source: Open.
        targets: This rank's shards by tensor name.
        plane: Carries the messages; None where there is one rank.
        done: Told the bytes of each slice read.
    """

    def __init__(
        self,
        rounds: Sequence[Round],
        *,
        source: Source,
        targets: Mapping[str, torch.Tensor],
        plane: DataPlane | None,
        done: Callable[[int], None],
    ) -> None:
        self._rounds = rounds
        self._source = source
        self._targets = targets
        self._plane = plane
        self._done = done
        device = plane.device if plane is not None else torch.device("cpu")
        pinned = device.type != "cpu"
        self._slice = self._buffer(
            (r.read.stop - r.read.start if r.read else 0 for r in rounds), pinned=pinned
        )
        self._send = self._buffer((sum(r.send_bytes) for r in rounds), pinned=pinned)
        self._receive = self._buffer((sum(r.receive_bytes) for r in rounds), device=device)

    def run(self) -> None:
        """Read, exchange and place everything.

        Raises:
            CheckpointError: A read failed.
            PeerError: Another rank failed.
        """
        for number, turn in enumerate(self._rounds):
            if turn.read is not None:
                nbytes = turn.read.stop - turn.read.start
                self._source.read_into(turn.read.file, turn.read.start, as_memory(self._slice[:nbytes]))
                self._done(nbytes)
            receive = self._receive[: sum(turn.receive_bytes)]
            work = None
            if self._plane is not None:
                self._pack(turn)
                send = self._send[: sum(turn.send_bytes)].to(self._plane.device)
                work = self._plane.all_to_all(
                    receive, send, receive_bytes=turn.receive_bytes, send_bytes=turn.send_bytes
                )
            for transfer in turn.kept:  # while the messages travel
                elements = elements_in(self._slice, transfer.slice_offset, transfer.dtype, transfer.piece)
                self._place(transfer, elements)
            if self._plane is not None and work is not None:
                self._plane.wait(work, what=f"round {number + 1} of {len(self._rounds)} of the exchange")
                self._unpack(turn, receive)

    def _pack(self, turn: Round) -> None:
        base = 0
        for message, length in zip(turn.outgoing, turn.send_bytes, strict=True):
            for transfer in message:
                piece, dtype = transfer.piece, transfer.dtype
                packed = packed_in(self._send, base + transfer.message_offset, dtype, piece)
                packed.copy_(elements_in(self._slice, transfer.slice_offset, dtype, piece))
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

    @staticmethod
    def _buffer(
        sizes: Iterable[int], *, pinned: bool = False, device: torch.device | None = None
    ) -> torch.Tensor:
        return torch.empty(max(sizes, default=0), dtype=torch.uint8, pin_memory=pinned, device=device)
