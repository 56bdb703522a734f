"""Tensors to be written that a conversion makes of whole ones: each conversion is done once, by one rank that writes what it made.

The conversions are dealt out to the writers in turn. In one step each of them gets the tensors of the model that one
conversion takes, from all ranks that keep parts of them, converts them, and writes the results; so a rank holds the sources and
results of one conversion at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shardwise.checkpoint import StoredTensor
from shardwise.conversion import WholeGroup
from shardwise.errors import CheckpointError, ShapeMismatchError, listed
from shardwise.export.collecting import Collecting
from shardwise.export.content import Content
from shardwise.export.output_files import OutputFiles
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.data_plane import DataPlane
from shardwise.materialization.freed import give_back_freed, in_own_pages
from shardwise.materialization.placing import as_memory
from shardwise.plan import ExchangePlan, as_stored, dealt, plan_exchange
from shardwise.tensors import dtype_name

_WRITE_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeStep:
    """What one rank does in one step.

    Args:
        whole: The conversion that it does; None where they ran out.
        exchange: That brings it the sources; the same one on all ranks.
    """

    whole: WholeGroup | None
    exchange: ExchangePlan


def plan_whole(
    content: Content,
    *,
    ranks: Sequence[int],
    writers: Sequence[int],
    rank: int,
    buffer_bytes: int,
) -> tuple[WholeStep, ...]:
    """Deal the conversions out to the ranks that write.

    Args:
        content: Of the export.
        ranks: Global ranks that take part.
        writers: Those of them that see the files.
        rank: This one.
        buffer_bytes: Bound of what a rank sends or receives in one round.

    Returns:
        Steps in order; equally many on every rank.
    """
    wholes = list({id(each.whole): each.whole for each in content.saved if each.whole is not None}.values())
    steps = []
    for first in range(0, len(wholes), len(writers)):
        of_writer = dict(zip(writers, wholes[first : first + len(writers)], strict=False))
        sources = {name: writer for writer, whole in of_writer.items() for name in whole.group.source_names}
        wanted = [
            tensor for name in sources for tensor in content.taken_from(name, as_stored(content.held[name]))
        ]
        exchange = plan_exchange(
            dealt(wanted, ranks=ranks, writers=writers),
            frozenset(range(len(wanted))),
            ranks=ranks,
            rank=rank,
            buffer_bytes=buffer_bytes,
            readers=tuple(of_writer),
            reader_of=sources.__getitem__,
        )
        steps.append(WholeStep(whole=of_writer.get(rank), exchange=exchange))
    return tuple(steps)


def write_whole(
    steps: Sequence[WholeStep],
    content: Content,
    *,
    files: OutputFiles,
    plane: DataPlane | None,
    agreement: Agreement,
) -> int:
    """Carry out all steps.

    Args:
        steps: Of this rank.
        content: Of the export.
        files: Of the export.
        plane: Carries the sources; None where there is one rank.
        agreement: Of the call.

    Returns:
        The bytes that this rank received.

    Raises:
        CheckpointError: A conversion fails, or does not make what it promised.
        PeerError: Another rank failed.
    """
    received, stored = 0, content.files.stored
    for step in steps:
        names = step.whole.group.source_names if step.whole is not None else ()
        sources = _Sources({name: content.held[name] for name in names})
        collecting = Collecting(
            step.exchange, sink=sources, shards=content.shards, plane=plane, agreement=agreement
        )
        collecting.run()
        received += collecting.received_bytes
        if step.whole is not None:
            for name, tensor in _made(step.whole, sources, stored).items():
                memory = as_memory(tensor) if tensor.numel() else memoryview(b"")
                for low in range(0, len(memory), _WRITE_BYTES):
                    part = memory[low : low + _WRITE_BYTES]
                    files.write(stored[name].file, stored[name].start + low, [part])
                    agreement.step()
                    agreement.check()
        del sources, collecting
        give_back_freed()
    return received


class _Sources:
    """Tensors of the model as they arrive: each a file of its own name, in memory."""

    def __init__(self, held: Mapping[str, StoredTensor]) -> None:
        self.tensors = {name: in_own_pages(of.shape, of.dtype) for name, of in held.items()}
        self._held = held

    def write(self, file: str, offset: int, parts: list[memoryview]) -> None:
        memory = as_memory(self.tensors[file])
        at = offset - self._held[file].start
        for part in parts:
            memory[at : at + len(part)] = part
            at += len(part)


def _made(
    whole: WholeGroup, sources: _Sources, stored: Mapping[str, StoredTensor]
) -> dict[str, torch.Tensor]:
    if whole.group.convert is None:
        return {}
    tensors = {
        pattern: [sources.tensors.pop(name) for name in names]
        for pattern, names in whole.group.sources.items()
    }
    tensors = {
        pattern: [each.to(whole.taken_dtype) if each.is_floating_point() else each for each in of_pattern]
        for pattern, of_pattern in tensors.items()
    }
    try:
        with torch.no_grad(), torch.device("cpu"):
            made = dict(whole.group.convert(tensors))
    except Exception as error:
        raise CheckpointError(
            f"{listed(whole.group.source_names)}: expected the conversion {whole.group.operations} to work on the model's "
            f"values, got {type(error).__name__}: {error}. Save this model with save_pretrained if transformers can."
        ) from error
    del tensors
    results = {}
    for name in whole.shapes:
        expected, value = stored[name], made.pop(name, None)
        if value is None or tuple(value.shape) != expected.shape:
            got = "none" if value is None else f"{tuple(value.shape)}"
            raise ShapeMismatchError(
                f"{name}: expected {expected.shape} from the conversion {whole.group.operations}, got {got}."
            )
        if value.dtype != expected.dtype:
            raise CheckpointError(
                f"{name}: expected {dtype_name(expected.dtype)} from the conversion {whole.group.operations}, got "
                f"{dtype_name(value.dtype)}, which only a run on values shows. Save this model with save_pretrained."
            )
        results[name] = value.contiguous()
    return results
