"""What a rank reads from each source, and what it exchanges and converts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from shardwise.checkpoint import Source
from shardwise.errors import ConfigurationError
from shardwise.materialization.convert import (
    ConversionStep,
    held_bytes_of,
    plan_conversions,
    source_bytes_of,
)
from shardwise.materialization.cpu_storage import CpuStorage
from shardwise.materialization.staging import read_bytes_of, ring_shape
from shardwise.materialization.wanted import Wanted
from shardwise.plan import (
    ExchangePlan,
    ReadPlan,
    Route,
    Sight,
    arriving_directly,
    choose_route,
    divide,
    mapped_of_reader,
    plan_exchange,
    plan_reads,
    require_covered,
)

EXCHANGE_BUFFERS = 5  # two extents, messages out, messages in, and what rounding and alignment add


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """What this rank does with one source.

    Args:
        source: Open.
        wanted: What of the model comes from it.
        route: That all ranks take.
        in_memory: Whether the source is memory of a rank rather than files.
        direct: What this rank reads for itself.
        exchanges: What it reads and exchanges, in the order in which all ranks go through theirs.
        replicated: Fqns of what it shares with the ranks that keep the same.
        converters: Ranks that make conversions for each other.
        steps: What it converts and exchanges.
    """

    source: Source
    wanted: Wanted
    route: Route
    in_memory: bool
    direct: ReadPlan
    exchanges: tuple[ExchangePlan, ...]
    replicated: Mapping[tuple[int, ...], tuple[str, ...]]
    converters: tuple[int, ...]
    steps: tuple[ConversionStep, ...]

    @property
    def fqns(self) -> tuple[str, ...]:
        """Of the model's tensors that it fills."""
        return (
            *(tensor.fqn for tensor in self.wanted.pieces),
            *(tensor.fqn for tensor in self.wanted.converted),
        )

    @property
    def moved_bytes(self) -> int:
        """Bytes that this rank takes from the source, be it storage or memory."""
        whole = sum(source_bytes_of(step.whole, self.source) for step in self.steps if step.whole is not None)
        return self.direct.storage_bytes + sum(each.storage_bytes for each in self.exchanges) + whole

    @property
    def storage_bytes(self) -> int:
        """Bytes that this rank requests from storage."""
        return 0 if self.in_memory else self.moved_bytes

    @property
    def network_bytes(self) -> int:
        """Bytes of messages that this rank receives from others."""
        steps = (step.exchange for step in self.steps)
        return sum(each.network_bytes for each in (*self.exchanges, *steps))

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that exchange something, group by group, in the order in which all ranks come to theirs."""
        exchanging = [each.ranks for each in self.exchanges if len(each) > 0]
        if self.steps:
            exchanging.append(self.converters)
        return tuple(dict.fromkeys(group for group in exchanging if len(group) > 1))

    @property
    def whole_tensor_bytes(self) -> int:
        """Most bytes that this rank holds at a time, beside its shards and staging, to convert whole tensors."""
        return max((held_bytes_of(step, self.source) for step in self.steps), default=0)


def plan_sources(
    wanted: Sequence[Wanted],
    *,
    sights: Sequence[Sight],
    route: str,
    rank: int,
    device: torch.device,
    on_host: bool,
    staging_bytes: int,
    cpu_storage: CpuStorage,
) -> list[SourcePlan]:
    """Plan what this rank reads from each source.

    Args:
        wanted: From each source; the same on all ranks.
        sights: Which ranks can read each source, in the same order; the same on all ranks.
        route: That was asked for.
        rank: This rank, global.
        device: Of parameters outside of FSDP2, for the message.
        on_host: Whether shards lie in host memory.
        staging_bytes: Bound of the staging buffers.
        cpu_storage: Whether shards in host memory may be pages of the file.

    Returns:
        One plan for each source, in the same order.

    Raises:
        CheckpointError: A shard would not be filled.
        ConfigurationError: `cpu_storage="map"` where nothing can be mapped, or a route that is not possible.
    """
    plans = [
        _plan_source(
            each,
            sight=sight,
            route=route,
            rank=rank,
            staging_bytes=staging_bytes,
            on_host=on_host,
        )
        for each, sight in zip(wanted, sights, strict=True)
    ]
    direct = (each.wanted.pieces for each in plans if each.route.name in ("direct", "replicate"))
    mapped = (t.mapped_on(t.layout.mesh_ranks[0]) for pieces in direct for t in pieces)
    if cpu_storage == "map" and not any(mapped):
        routes = ", ".join(dict.fromkeys(each.route.name for each in plans))
        raise ConfigurationError(
            f"cpu_storage='map': expected shards in host memory that are runs of bytes in the file, in its dtype, and that each "
            f"rank reads itself, got none (device {device}, route {routes}). Use cpu_storage='auto', which copies what cannot be "
            "mapped."
        )
    return plans


def _plan_source(
    wanted: Wanted, *, sight: Sight, route: str, rank: int, staging_bytes: int, on_host: bool
) -> SourcePlan:
    pieces, source = wanted.pieces, wanted.source
    max_read_bytes = ring_shape(staging_bytes, on_host=on_host).nbytes
    # All ranks must choose the same, whatever their environment says of chunks.
    chosen = choose_route(route, pieces, sight, max_read_bytes=read_bytes_of(staging_bytes))
    division = divide(chosen, pieces, sight).of(rank)
    direct = plan_reads(
        [pieces[index] for index in division.direct],
        rank=rank,
        max_read_bytes=max_read_bytes,
        joins_runs=not on_host,
        node_of=sight.node_of,
    )
    buffer_bytes = staging_bytes // EXCHANGE_BUFFERS
    exchanges: list[ExchangePlan] = []
    for sharing in division.sharings:
        # Their bytes are read along with the others', and counted there.
        own = mapped_of_reader(
            pieces, sharing.chosen, ranks=sharing.ranks, readers=sharing.readers, rank=rank
        )
        mapped = frozenset(each.fqn for each in own)
        direct = replace(direct, mapped=(*direct.mapped, *own), shared=direct.shared | mapped)
        exchanges.append(
            plan_exchange(
                pieces,
                sharing.chosen,
                ranks=sharing.ranks,
                rank=rank,
                buffer_bytes=buffer_bytes,
                readers=sharing.readers,
                mapped=mapped,
            )
        )
    steps = plan_conversions(
        wanted.converted,
        ranks=division.converters.ranks,
        readers=division.converters.readers,
        rank=rank,
        buffer_bytes=buffer_bytes,
    )
    replicated: dict[tuple[int, ...], tuple[str, ...]] = {}
    for sharing in division.sharings:
        if sharing.keep_the_same:
            fqns = tuple(pieces[index].fqn for index in sorted(sharing.chosen))
            replicated[sharing.ranks] = (*replicated.get(sharing.ranks, ()), *fqns)
    arriving = (arriving_directly(direct, pieces), *(each.arriving for each in exchanges))
    require_covered(pieces, arriving, rank=rank, name=source.name)
    for step in steps:
        require_covered(step.exchange.wanted, (step.exchange.arriving,), rank=rank, name=source.name)
    return SourcePlan(
        source=source,
        wanted=wanted,
        route=chosen,
        in_memory=sight.in_memory,
        direct=direct,
        exchanges=tuple(exchanges),
        replicated=replicated,
        converters=division.converters.ranks,
        steps=steps,
    )
