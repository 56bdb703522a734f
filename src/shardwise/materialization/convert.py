"""Conversions that must see whole tensors: each is done once, by one rank, and its rows are sent to their owners.

The groups are dealt out to the ranks in turn. In one step each rank reads the sources of one group, converts them, and all
ranks exchange the results; so a rank holds the sources and results of one group at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from shardwise.checkpoint import Readable, StateDictSource, StoredTensor
from shardwise.conversion import WholeGroup
from shardwise.errors import CheckpointError, ShapeMismatchError
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.awaited_source import awaited
from shardwise.materialization.data_plane import DataPlane
from shardwise.materialization.exchange import Exchange
from shardwise.materialization.freed import give_back_freed, in_own_pages
from shardwise.materialization.placing import as_memory
from shardwise.plan import ExchangePlan, Layout, WantedTensor, as_stored, plan_exchange
from shardwise.tensors import dtype_name


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedTensor:
    """A tensor of the model that a whole conversion makes.

    Args:
        fqn: In the model.
        name: That the conversion gives it.
        whole: The conversion.
        dtype: In which the shard is kept.
        layout: How the full tensor lies over the ranks.
    """

    fqn: str
    name: str
    whole: WholeGroup
    dtype: torch.dtype
    layout: Layout

    @property
    def stored(self) -> StoredTensor:
        """The result as a stored tensor, in a file of its own."""
        shape = self.whole.shapes[self.name]
        nbytes = torch.Size(shape).numel() * self.dtype.itemsize
        return StoredTensor(name=self.fqn, shape=shape, dtype=self.dtype, file=self.fqn, start=0, stop=nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionStep:
    """What one rank does in one step.

    Args:
        whole: That it converts; None where the groups ran out.
        results: That it is wanted for.
        exchange: That follows.
    """

    whole: WholeGroup | None
    results: tuple[ConvertedTensor, ...]
    exchange: ExchangePlan


def plan_conversions(
    converted: Sequence[ConvertedTensor],
    *,
    ranks: Sequence[int],
    readers: Sequence[int],
    rank: int,
    buffer_bytes: int,
) -> tuple[ConversionStep, ...]:
    """Deal the conversions out to the ranks that can read their sources.

    Args:
        converted: The same on all ranks.
        ranks: Global ranks that take part.
        readers: Those of them that can read.
        rank: This one.
        buffer_bytes: Bound of what a rank sends or receives in one round, in bytes.

    Returns:
        Steps in order; equally many on every rank.
    """
    by_group: dict[int, list[ConvertedTensor]] = {}
    for tensor in converted:
        by_group.setdefault(id(tensor.whole), []).append(tensor)
    groups = list(by_group.values())
    steps = []
    for first in range(0, len(groups), len(readers)):
        of_reader = dict(zip(readers, groups[first : first + len(readers)], strict=False))
        reader_of = {t.fqn: reader for reader, group in of_reader.items() for t in group}
        wanted = [
            WantedTensor(
                fqn=t.fqn,
                shape=t.whole.shapes[t.name],
                dtype=t.dtype,
                layout=t.layout,
                pieces=as_stored(t.stored),
                partial=False,
                may_map=False,
            )
            for group in of_reader.values()
            for t in group
        ]
        exchange = plan_exchange(
            wanted,
            frozenset(range(len(wanted))),
            ranks=ranks,
            rank=rank,
            buffer_bytes=buffer_bytes,
            readers=tuple(of_reader),
            reader_of=reader_of.__getitem__,
        )
        mine = tuple(of_reader.get(rank, ()))
        steps.append(ConversionStep(whole=mine[0].whole if mine else None, results=mine, exchange=exchange))
    return tuple(steps)


def convert(
    steps: Sequence[ConversionStep],
    source: Readable,
    *,
    place: Mapping[str, torch.Tensor],
    plane: DataPlane | None,
    agreement: Agreement,
    done: Callable[[int], None],
) -> None:
    """Carry out all steps.

    Args:
        steps: Of this rank.
        source: Open.
        place: This rank's shards by fqn.
        plane: Carries the results; None where there is one rank.
        agreement: Of the call.
        done: Told the bytes of each source read.

    Raises:
        CheckpointError: A source cannot be read, or a conversion did not make what it promised.
        PeerError: Another rank failed.
    """
    for step in steps:
        results = _results(step, source, done) if step.whole is not None else {}
        with awaited(StateDictSource(results), agreement, name="what a conversion has made") as made:
            Exchange(step.exchange, source=made, targets=place, plane=plane, done=lambda _: None).run()
        del results, made  # else they would live on while the next step reads its sources
        give_back_freed()


def source_bytes_of(whole: WholeGroup, source: Readable) -> int:
    """Return the bytes of the stored tensors that a conversion takes."""
    return sum(source.tensors[name].nbytes for name in whole.group.source_names)


def held_bytes_of(step: ConversionStep, source: Readable) -> int:
    """Return the most bytes that a step holds at a time: its sources, as the conversion takes them, and its results.

    What an operation keeps for itself while it runs is not known here.
    """
    if step.whole is None:
        return 0
    dtype = _source_dtype(step)
    sources = sum(
        math.prod(source.tensors[name].shape) * _taken_as(source.tensors[name], dtype).itemsize
        for name in step.whole.group.source_names
    )
    return sources + sum(each.stored.nbytes for each in step.results)


def _source_dtype(step: ConversionStep) -> torch.dtype:
    """Return the dtype in which a conversion takes floating point sources: that of its first result, unless it makes another."""
    if step.whole is not None and step.whole.made_dtypes:
        return step.whole.taken_dtype
    target = step.whole.group.target if step.whole is not None else None
    return next((t for t in step.results if t.name == target), step.results[0]).dtype


def _taken_as(stored: StoredTensor, dtype: torch.dtype) -> torch.dtype:
    is_plain = stored.dtype.is_floating_point and stored.dtype.itemsize > 1
    return dtype if is_plain else stored.dtype


def _results(step: ConversionStep, source: Readable, done: Callable[[int], None]) -> dict[str, torch.Tensor]:
    whole = step.whole
    if whole is None or whole.group.convert is None:
        return {}
    dtype = _source_dtype(step)
    tensors = {
        pattern: [_read_whole(source, name, dtype, done) for name in names]
        for pattern, names in whole.group.sources.items()
    }
    try:
        with torch.no_grad(), torch.device("cpu"):
            made = dict(whole.group.convert(tensors))
    except Exception as error:
        shapes = {
            f"{pattern} x {len(names)}": source.tensors[names[0]].shape
            for pattern, names in whole.group.sources.items()
        }
        raise CheckpointError(
            f"{whole.group.target}: expected the conversion {whole.group.operations} to work on what the checkpoint holds, {shapes}, "
            f"got {type(error).__name__}: {error}. Does config.json belong to this checkpoint? If transformers itself loads it, use "
            "load_pretrained(defer=False)."
        ) from error
    del tensors  # what the results do not refer to makes room for their copies
    results = {}
    for tensor in step.results:
        value = made.pop(tensor.name, None)
        expected = whole.shapes[tensor.name]
        if value is None or tuple(value.shape) != expected:
            got = "none" if value is None else f"{tuple(value.shape)}"
            raise ShapeMismatchError(
                f"{tensor.fqn}: expected {expected} from the conversion {whole.group.operations}, got {got}."
            )
        if value.dtype not in (tensor.dtype, whole.made_dtypes.get(tensor.name)):
            raise CheckpointError(
                f"{tensor.fqn}: expected {dtype_name(tensor.dtype)} from the conversion {whole.group.operations}, got "
                f"{dtype_name(value.dtype)}, which only a run on values shows. Load in that dtype (dtype=), or use "
                "load_pretrained(defer=False)."
            )
        results[tensor.fqn] = value.to(tensor.dtype).contiguous()
    return results


def _read_whole(source: Readable, name: str, dtype: torch.dtype, done: Callable[[int], None]) -> torch.Tensor:
    stored = source.tensors[name]
    tensor = in_own_pages(stored.shape, stored.dtype)
    if stored.nbytes:
        source.read_into(stored.file, stored.start, as_memory(tensor))
        done(stored.nbytes)
    return tensor.to(_taken_as(stored, dtype))
