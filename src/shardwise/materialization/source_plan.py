"""What a rank reads from each source: what of the model is wanted, which all ranks compare, and this rank's plan."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

from shardwise.checkpoint import Source
from shardwise.errors import ConfigurationError
from shardwise.materialization.binding import Bound
from shardwise.materialization.convert import (
    ConversionStep,
    ConvertedTensor,
    held_bytes_of,
    plan_conversions,
    source_bytes_of,
)
from shardwise.materialization.staging import read_bytes_of
from shardwise.materialization.storage import mappable_parameters
from shardwise.materialization.structure import Entry
from shardwise.plan import (
    ExchangePlan,
    Layout,
    ReadPlan,
    Route,
    Sight,
    WantedTensor,
    arriving_directly,
    choose_route,
    divide,
    plan_exchange,
    plan_reads,
    require_covered,
)

CpuStorage = Literal["auto", "map", "copy"]
CPU_STORAGE = ("auto", "map", "copy")
EXCHANGE_BUFFERS = 5  # two extents, messages out, messages in, and what rounding and alignment add


def checked_cpu_storage(cpu_storage: str, *, direct_io: bool) -> CpuStorage:
    """Return how shards of CPU ranks are kept.

    Args:
        cpu_storage: As the user says.
        direct_io: Whether files are to be read past the page cache, through which mapped pages come.

    Raises:
        ConfigurationError: It is no such way, or the two contradict each other.
    """
    if cpu_storage not in CPU_STORAGE:
        raise ConfigurationError(
            f"cpu_storage: expected one of {', '.join(CPU_STORAGE)}, got {cpu_storage!r}"
        )
    if direct_io and cpu_storage == "map":
        raise ConfigurationError(
            "direct_io=True and cpu_storage='map': expected one of them, got both. Mapped pages are pages of the page cache: use "
            "cpu_storage='copy', or leave direct_io out."
        )
    return "copy" if direct_io else cast(CpuStorage, cpu_storage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What of a model comes from one source; equal on all ranks.

    Args:
        source: Open.
        pieces: Tensors that consist of pieces of stored ones.
        converted: Those that a conversion makes of whole ones.
    """

    source: Source
    pieces: tuple[WantedTensor, ...]
    converted: tuple[ConvertedTensor, ...]

    def lines(self) -> Iterator[str]:
        """Yield a line of text for each tensor, equal exactly where ranks would plan the same for it."""
        for tensor in self.pieces:
            kept = "may be mapped" if tensor.may_map else "copied"
            yield (
                f"{tensor.fqn} {tensor.shape} {tensor.dtype} {kept} {_of_layout(tensor.layout)}: "
                + "; ".join(
                    f"{each.stored.name} {each.stored.shape} {each.stored.dtype} in {each.stored.file} at {each.stored.start} "
                    f"{each.piece.sizes} {each.piece.source_start} {each.piece.source_strides} {each.piece.target_start} "
                    f"{each.piece.target_dims} {each.piece.target_strides}"
                    for each in tensor.pieces
                )
            )
        for made in self.converted:
            shape = made.whole.shapes[made.name]
            yield (
                f"{made.fqn} {shape} {made.dtype} {_of_layout(made.layout)}: {made.name} by {made.whole.group.operations} of "
                + ", ".join(made.whole.group.source_names)
                + f" taken in {made.whole.taken_dtype if made.whole.made_dtypes else made.dtype}"
            )


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


def wanted_of(
    model: nn.Module,
    entries: Sequence[Entry],
    bound: Mapping[str, Bound],
    *,
    partial: Collection[str],
    layouts: Mapping[str, Layout],
    device: torch.device,
    cpu_storage: CpuStorage,
    dtype_of: Mapping[str, torch.dtype],
) -> list[Wanted]:
    """Describe what of a model comes from which source.

    Args:
        model: Sharded, on meta or with storage.
        entries: Of the model.
        bound: Where values are, by fqn.
        partial: Fqns of which a source has a part alone.
        layouts: Of the model's tensors, as all ranks see them.
        device: Of parameters outside of FSDP2.
        cpu_storage: Whether shards in host memory may be pages of the file.
        dtype_of: In which each shard is kept, by fqn.

    Returns:
        One for each source, in the order in which the model names them.
    """
    may_map = mappable_parameters(model, entries, device) if cpu_storage != "copy" else frozenset()
    by_source: dict[int, tuple[Source, list[WantedTensor], list[ConvertedTensor]]] = {}
    taken: set[tuple[int, str]] = set()
    for entry in entries:
        if entry.role == "attribute" or entry.fqn not in bound:
            continue
        of = bound[entry.fqn]
        _, pieces, converted = by_source.setdefault(id(of.source), (of.source, [], []))
        if of.whole is not None:
            converted.append(
                ConvertedTensor(
                    fqn=entry.fqn,
                    name=of.name,
                    whole=of.whole,
                    dtype=dtype_of[entry.fqn],
                    layout=layouts[entry.fqn],
                )
            )
            continue
        names = {(id(of.source), stored.name) for stored in of.stored}
        pieces.append(
            WantedTensor(
                fqn=entry.fqn,
                shape=of.shape,
                dtype=dtype_of[entry.fqn],
                layout=layouts[entry.fqn],
                pieces=of.pieces,
                partial=entry.fqn in partial,
                # Two parameters over the same pages would be one; and what is initialised first would be in the file's pages.
                may_map=entry.fqn in may_map and entry.fqn not in partial and not names & taken,
            )
        )
        taken |= names
    return [
        Wanted(source=source, pieces=tuple(pieces), converted=tuple(converted))
        for source, pieces, converted in by_source.values()
    ]


def plan_sources(
    wanted: Sequence[Wanted],
    *,
    sights: Sequence[Sight],
    route: str,
    rank: int,
    device: torch.device,
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
        staging_bytes: Bound of the staging buffers.
        cpu_storage: Whether shards in host memory may be pages of the file.

    Returns:
        One plan for each source, in the same order.

    Raises:
        CheckpointError: A shard would not be filled.
        ConfigurationError: `cpu_storage="map"` where nothing can be mapped, or a route that is not possible.
    """
    plans = [
        _plan_source(each, sight=sight, route=route, rank=rank, staging_bytes=staging_bytes)
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


def _plan_source(wanted: Wanted, *, sight: Sight, route: str, rank: int, staging_bytes: int) -> SourcePlan:
    pieces, source = wanted.pieces, wanted.source
    max_read_bytes = read_bytes_of(staging_bytes)
    chosen = choose_route(route, pieces, sight, max_read_bytes=max_read_bytes)
    division = divide(chosen, pieces, sight).of(rank)
    direct = plan_reads(
        [pieces[index] for index in division.direct],
        rank=rank,
        max_read_bytes=max_read_bytes,
        node_of=sight.node_of,
    )
    buffer_bytes = staging_bytes // EXCHANGE_BUFFERS
    exchanges = tuple(
        plan_exchange(
            pieces,
            sharing.chosen,
            ranks=sharing.ranks,
            rank=rank,
            buffer_bytes=buffer_bytes,
            readers=sharing.readers,
        )
        for sharing in division.sharings
    )
    steps = plan_conversions(
        wanted.converted,
        ranks=division.converters.ranks,
        readers=division.converters.readers,
        rank=rank,
        buffer_bytes=buffer_bytes,
    )
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
        exchanges=exchanges,
        replicated={
            sharing.ranks: tuple(pieces[index].fqn for index in sorted(sharing.chosen))
            for sharing in division.sharings
            if sharing.keep_the_same
        },
        converters=division.converters.ranks,
        steps=steps,
    )


def _of_layout(layout: Layout) -> str:
    return f"{layout.placements} on {layout.mesh_shape}"
