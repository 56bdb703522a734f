"""Bytes from host buffers into shards on a device, while the next ones are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from shardwise.materialization.device import on_stream
from shardwise.materialization.landings import Landing, plan_copies
from shardwise.materialization.placing import place_in

LANES = 2
"""While one places what has arrived, the other one's bytes are on their way."""
_ALIGNMENT_BYTES = 16
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TOGETHER = frozenset({*_WORDS.values(), torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Between which the devices' kernel for many tensors casts; it refuses some others, that a copy of one tensor takes."""


@dataclass(slots=True)
class _Lane:
    """A stream of its own, and memory on the device that bytes are placed from."""

    stream: torch.Stream
    scratch: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arrived:
    """Bytes on the device, from byte `begin` of their buffer on, and what they hold."""

    content: torch.Tensor
    begin: int
    landings: tuple[Landing, ...]


class DevicePlacing:
    """Copies of bytes to shards on one device, on streams of its own.

    Bytes travel as they are: a copy between dtypes, or to places that are no run, would be made ready on the host by torch, wait for
    the device, and take device memory that is in no plan. What is to be cast or strewn goes to scratch memory first.

    The streams begin after what the current one has been given so far, so that memory which has been freed there, and values which are
    written first, come before. The current one waits for them once, in `close`; until then the shards must not be used.

    Args:
        targets: This rank's shards by tensor name; those in other memory are filled at once.
        device: Of the others.
        lanes: Number of streams.
        scratch_bytes: Of each; it grows where a landing is longer.
    """

    def __init__(
        self, targets: Mapping[str, torch.Tensor], *, device: torch.device, lanes: int, scratch_bytes: int
    ) -> None:
        self._targets = targets
        self._device = device
        self._count = lanes
        self._scratch_bytes = scratch_bytes
        self._lanes: list[_Lane] = []
        self._next = 0
        self._flat_of: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def place(self, buffer: torch.Tensor, landings: Sequence[Landing]) -> torch.Event | None:
        """Begin to bring what a buffer in host memory holds into the shards.

        Args:
            buffer: uint8; pinned, or this call waits for the device.
            landings: That it holds.

        Returns:
            Reached when the buffer may be written again; None: at once.
        """
        here = [landing for landing in landings if self._targets[landing.fqn].device == self._device]
        for landing in landings:
            if self._targets[landing.fqn].device != self._device:
                place_in(self._targets[landing.fqn], landing.piece).copy_(landing.elements(buffer, begin=0))
        if not here:
            return None
        copies = plan_copies(here, run_of=self._direct_run_of, scratch_bytes=self._scratch_bytes)
        longest = max((copy.nbytes for copy in copies if copy.run is None), default=0)
        lane = self._lane(longest)
        waiting: list[_Arrived] = []
        used = 0
        with on_stream(lane.stream):
            for copy in copies:
                host = buffer[copy.start : copy.stop]
                if copy.run is not None:
                    shard = self._flat(copy.landings[0].fqn).view(torch.uint8)
                    itemsize = copy.landings[0].dtype.itemsize
                    into = shard[copy.run.start * itemsize : copy.run.stop * itemsize]
                    into.copy_(host, non_blocking=True)
                    continue
                if used + copy.nbytes > len(lane.scratch):
                    self._place_from(waiting)
                    waiting, used = [], 0
                arrived = lane.scratch[used : used + copy.nbytes]
                arrived.copy_(host, non_blocking=True)
                waiting.append(_Arrived(content=arrived, begin=copy.start, landings=copy.landings))
                used += -(-copy.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            copied = lane.stream.record_event()
            self._place_from(waiting)
        return copied

    @torch.no_grad()
    def place_from_device(self, buffer: torch.Tensor, landings: Iterable[Landing]) -> None:
        """Bring what a buffer on the device holds into the shards, on the current stream.

        Args:
            buffer: uint8.
            landings: That it holds; their elements at multiples of their size.
        """
        self._place_from([_Arrived(content=buffer, begin=0, landings=tuple(landings))])

    def close(self) -> None:
        """Let the current stream wait for all that was begun, and wait until host memory and scratch memory are free."""
        lanes, self._lanes = self._lanes, []
        for lane in lanes:
            torch.accelerator.current_stream(self._device).wait_stream(lane.stream)
        for lane in lanes:
            lane.stream.synchronize()

    def _lane(self, longest: int) -> _Lane:
        if len(self._lanes) < self._count:
            # Before the stream begins: what this memory was used for until now is then over.
            scratch = self._scratch(max(longest, self._scratch_bytes))
            stream = torch.Stream(device=self._device)
            stream.wait_stream(torch.accelerator.current_stream(self._device))
            self._lanes.append(_Lane(stream=stream, scratch=scratch))
            return self._lanes[-1]
        lane = self._lanes[self._next % self._count]
        self._next += 1
        if longest > len(lane.scratch):
            lane.stream.synchronize()
            lane.scratch = torch.empty(0, dtype=torch.uint8, device="cpu")  # the two never live together
            lane.scratch = self._scratch(longest)
            lane.stream.wait_stream(torch.accelerator.current_stream(self._device))
        return lane

    def _scratch(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _run_of(self, landing: Landing) -> range | None:
        """Return which elements of the flat shard a landing is, one after the other; None where it is no run of it."""
        shard = self._targets[landing.fqn]
        if not landing.is_one_run or not shard.is_contiguous():
            return None
        return landing.piece.run_in(tuple(shard.shape))

    def _direct_run_of(self, landing: Landing) -> range | None:
        return self._run_of(landing) if self._targets[landing.fqn].dtype == landing.dtype else None

    def _flat(self, fqn: str) -> torch.Tensor:
        if fqn not in self._flat_of:
            self._flat_of[fqn] = self._targets[fqn].detach().view(-1)
        return self._flat_of[fqn]

    def _place_from(self, arrived: Sequence[_Arrived]) -> None:
        """Place elements that are on the device, those that are runs of their shards in few calls."""
        runs: defaultdict[tuple[torch.dtype, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]]
        runs = defaultdict(lambda: ([], []))
        for each in arrived:
            typed: dict[torch.dtype, torch.Tensor] = {}  # views are what small tensors cost
            for landing in each.landings:
                run = self._run_of(landing)
                at, past = divmod(landing.offset - each.begin, landing.dtype.itemsize)
                if run is None or past:
                    into = place_in(self._targets[landing.fqn], landing.piece)
                    into.copy_(landing.elements(each.content, begin=each.begin))
                    continue
                into, source = self._flat(landing.fqn), landing.dtype
                if source == into.dtype and source.itemsize in _WORDS:
                    # Every dtype can be moved as words; kernels are missing for some.
                    source = _WORDS[source.itemsize]
                    into = into.view(source)
                if source not in typed:
                    whole = len(each.content) // source.itemsize * source.itemsize
                    typed[source] = each.content[:whole].view(source)
                place, value = into[run.start : run.stop], typed[source][at : at + len(run)]
                if not {source, into.dtype} <= _TOGETHER:
                    place.copy_(value)
                    continue
                places, values = runs[source, into.dtype]
                places.append(place)
                values.append(value)
        for places, values in runs.values():
            torch._foreach_copy_(places, values)


def device_of_targets(targets: Mapping[str, torch.Tensor]) -> torch.device:
    """Return the device that shards lie on; of several kinds of memory the first that is not the host's."""
    devices = dict.fromkeys(shard.device for shard in targets.values())
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
