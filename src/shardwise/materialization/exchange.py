"""Execute an exchange: in each round this rank reads one slice and every rank gets its pieces of all slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from shardwise.checkpoint import Source
from shardwise.materialization.data_plane import DataPlane
from shardwise.materialization.read import as_memory, strided_view
from shardwise.plan import Round
from shardwise.plan.boxes import row_major_strides, span


class Exchange:
    """One rank's part in all rounds.

    Args:
        rounds: Of this rank; as many on every rank.
        source: Open.
        targets: This rank's shards by tensor name.
        plane: Carries the messages.
        done: Told the bytes of each slice read.
    """

    def __init__(
        self,
        rounds: Sequence[Round],
        *,
        source: Source,
        targets: Mapping[str, torch.Tensor],
        plane: DataPlane,
        done: Callable[[int], None],
    ) -> None:
        self._rounds = rounds
        self._source = source
        self._targets = targets
        self._plane = plane
        self._done = done
        pinned = plane.device.type != "cpu"
        self._slice = self._buffer(
            (r.read.stop - r.read.start if r.read else 0 for r in rounds), pinned=pinned
        )
        self._send = self._buffer((sum(r.send_bytes) for r in rounds), pinned=pinned)
        self._receive = self._buffer((sum(r.receive_bytes) for r in rounds), device=plane.device)

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
            self._pack(turn)
            send = self._send[: sum(turn.send_bytes)].to(self._plane.device)
            receive = self._receive[: sum(turn.receive_bytes)]
            work = self._plane.all_to_all(
                receive, send, receive_bytes=turn.receive_bytes, send_bytes=turn.send_bytes
            )
            self._plane.wait(work, what=f"round {number + 1} of {len(self._rounds)} of the exchange")
            self._unpack(turn, receive)

    def _pack(self, turn: Round) -> None:
        base = 0
        for pieces, length in zip(turn.outgoing, turn.send_bytes, strict=True):
            for piece in pieces:
                itemsize = piece.dtype.itemsize
                box = strided_view(
                    self._slice,
                    piece.slice_offset,
                    piece.dtype,
                    piece.shape,
                    piece.strides,
                    span(piece.shape, piece.strides) * itemsize,
                )
                message = self._send[base + piece.message_offset :][: box.numel() * itemsize]
                message.view(piece.dtype).view(piece.shape).copy_(box)
            base += length

    def _unpack(self, turn: Round, receive: torch.Tensor) -> None:
        base = 0
        for pieces, length in zip(turn.incoming, turn.receive_bytes, strict=True):
            for piece in pieces:
                shape = piece.local.shape
                strides = row_major_strides(shape)
                nbytes = span(shape, strides) * piece.dtype.itemsize
                box = strided_view(receive, base + piece.message_offset, piece.dtype, shape, strides, nbytes)
                with torch.no_grad():
                    self._targets[piece.fqn][piece.local.slices()].copy_(box)
            base += length

    @staticmethod
    def _buffer(
        sizes: Iterable[int], *, pinned: bool = False, device: torch.device | None = None
    ) -> torch.Tensor:
        return torch.empty(max(sizes, default=0), dtype=torch.uint8, pin_memory=pinned, device=device)
