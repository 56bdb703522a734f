"""Execute a write plan: a rank's own elements to their places, straight from its shards or through staging."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future

import torch

from shardwise.export.output_files import OutputFiles
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.awaited_call import Doing, await_call, calling_threads
from shardwise.materialization.placing import ShardMemory, as_memory, elements_in, place_in
from shardwise.materialization.read import read_threads
from shardwise.materialization.staging import StagingRing
from shardwise.plan import Write


class Writing:
    """One rank's writes.

    Args:
        writes: In file order.
        files: Of the export.
        shards: This rank's shards by fqn.
        ring: Staging.
        agreement: Of the call; asked for failures of other ranks while writes are awaited.
    """

    def __init__(
        self,
        writes: tuple[Write, ...],
        *,
        files: OutputFiles,
        shards: Mapping[str, torch.Tensor],
        ring: StagingRing,
        agreement: Agreement,
    ) -> None:
        self._writes = writes
        self._files = files
        self._shards = shards
        self._ring = ring
        self._agreement = agreement
        self._memory = ShardMemory(shards)

    def run(self) -> None:
        """Write everything.

        Raises:
            CheckpointError: A write failed.
            PeerError: Another rank failed.
        """
        if not self._writes:
            return
        count = read_threads()
        in_flight: deque[tuple[Write, torch.Tensor | None, Future[None]]] = deque()
        with calling_threads(count, name="shardwise-write") as threads:
            for write in self._writes:
                parts = self._in_place(write)
                while len(in_flight) >= 2 * count or (parts is None and not self._ring.available):
                    self._finish(*in_flight.popleft())
                buffer = None
                if parts is None:
                    buffer = self._ring.take()
                    self._stage(write, buffer)
                    parts = [as_memory(buffer[: write.nbytes])]
                future = threads.submit(self._files.write, write.file, write.start, parts)
                in_flight.append((write, buffer, future))
            while in_flight:
                self._finish(*in_flight.popleft())

    def _finish(self, write: Write, buffer: torch.Tensor | None, future: Future[None]) -> None:
        what = f"{write.file}: writing {write.nbytes:,} bytes at byte {write.start:,}"
        await_call(future, self._agreement, Doing(what))
        self._agreement.step()
        if buffer is not None:
            self._ring.give_back(buffer)

    def _stage(self, write: Write, buffer: torch.Tensor) -> None:
        with torch.no_grad():
            for fragment in write.fragments:
                offset = fragment.start - write.start
                into = elements_in(buffer, offset, fragment.stored.dtype, fragment.piece)
                into.copy_(place_in(self._shards[fragment.fqn], fragment.piece))

    def _in_place(self, write: Write) -> list[memoryview] | None:
        """Return where the bytes of a write lie as they are, if all of them do."""
        parts = []
        for fragment in write.fragments:
            memory = self._memory.of(fragment)
            if memory is None:
                return None
            parts.append(memory)
        return parts
