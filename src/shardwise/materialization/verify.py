"""Compare a model with a checkpoint, value by value, each rank its own shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardwise.checkpoint import Source
from shardwise.errors import CheckpointError, ConfigurationError, LeftOnMetaError, listed
from shardwise.materialization.argument_kinds import check_kinds
from shardwise.materialization.arguments import argument_lines, kind_of_checkpoint
from shardwise.materialization.awaited_source import awaited, require_unchanged
from shardwise.materialization.begin_call import begin_call
from shardwise.materialization.binding import Rename, bind, check_bound
from shardwise.materialization.comparing import comparable_lines, comparable_structure
from shardwise.materialization.convert import (
    ConvertedTensor,
    convert,
    plan_conversions,
    source_bytes_of,
)
from shardwise.materialization.data_plane import open_data_plane
from shardwise.materialization.layouts import agreed_layouts
from shardwise.materialization.open_source import Checkpoint, RemoteSource, open_source
from shardwise.materialization.placing import place_in
from shardwise.materialization.read import Reading, fragment_by_fragment
from shardwise.materialization.sight import is_in_memory
from shardwise.materialization.source_plan import EXCHANGE_BUFFERS
from shardwise.materialization.staging import (
    RING_BUFFERS,
    StagingRing,
    default_staging_bytes,
    read_bytes_of,
)
from shardwise.materialization.storage import local_of, reshard
from shardwise.materialization.structure import Entry, Structure, entries_of
from shardwise.materialization.timeouts import timeout_seconds_of
from shardwise.materialization.wanted import Wanted
from shardwise.plan import Fragment, WantedTensor, plan_reads
from shardwise.tensors import dtype_name

_MOST_SHOWN = 20  # shards that differ, in a summary; a report has all


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """A shard that is not what the checkpoint holds.

    Args:
        fqn: Of the tensor.
        checkpoint_name: On disk, of the first element that differs.
        file: Within the checkpoint, of the same.
        rank: That holds the shard.
        elements: How many differ.
        first_index: Of the first of them, in the shard.
    """

    fqn: str
    checkpoint_name: str
    file: str
    rank: int
    elements: int
    first_index: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a comparison found on all ranks.

    Args:
        checkpoint: That the model was compared with.
        tensors: How many were compared.
        storage_bytes: Requested by all ranks together.
        absent: Names that the checkpoint lacks; they were not compared.
        mismatches: In the order of ranks, then of the model.
        casts: Stored dtypes that were cast before they were compared, as `float32 to bfloat16`.
    """

    checkpoint: str
    tensors: int
    storage_bytes: int
    absent: tuple[str, ...]
    mismatches: tuple[Mismatch, ...]
    casts: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        """Whether every tensor that was compared has the checkpoint's values."""
        return not self.mismatches

    def summary(self) -> str:
        """Return the result as one line of text, and one line for each of the first shards that differ."""
        state = "equal" if self.is_equal else _counted(len(self.mismatches), "shard differs", "shards differ")
        compared = _counted(self.tensors, "tensor", "tensors")
        lines = [f"{self.checkpoint}: {compared} compared, {state}"]
        if self.casts:
            lines.append(f"stored values were cast before they were compared: {', '.join(self.casts)}")
        if self.absent:
            lines.append(f"not in the checkpoint: {listed(self.absent)}")
        lines += [
            f"{m.fqn} (rank {m.rank}): {_counted(m.elements, 'element differs', 'elements differ')} from {m.checkpoint_name} "
            f"in {m.file}, the first at {m.first_index} of the shard"
            for m in self.mismatches[:_MOST_SHOWN]
        ]
        if len(self.mismatches) > _MOST_SHOWN:
            lines.append(f"and {len(self.mismatches) - _MOST_SHOWN} more")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data for `json.dump`."""
        return {**asdict(self), "is_equal": self.is_equal}


def verify_shards(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    rename: Rename = None,
    conversions: Sequence[Any] | None = None,
    staging_bytes: int | None = None,
    group: dist.ProcessGroup | None = None,
    timeout: float | timedelta | None = None,
) -> VerifyReport:
    """Compare every parameter and persistent buffer with a checkpoint, byte for byte, without gathering anything.

    All ranks of the group call this together. A stored value is cast to the dtype of the shard before it is compared.

    Args:
        model: With values; sharded or not.
        checkpoint: Directory, safetensors file, hub id or `Source`.
        rename: From names in the model to names in the checkpoint.
        conversions: As `materialize` takes them.
        staging_bytes: Bound of the host buffers, in bytes; None is 64 MiB on CPU ranks and 256 MiB on accelerators.
        group: Ranks that take part; None is the default group.
        timeout: How long to wait for a rank that does not arrive, in seconds or as a timedelta; None is the group's own timeout.

    Returns:
        What differs, the same on all ranks.

    Raises:
        CheckpointError: The checkpoint is damaged, holds none of the model's names, or a shape is not the model's.
        LeftOnMetaError: The model has no values yet.
        RankError: A rank failed, or did not arrive.
    """
    agreement = begin_call("verify_shards", group=group)
    ranks = agreement.ranks
    with agreement.phase("check") as check:
        agreement.timeout_seconds = timeout_seconds_of(timeout, group=group)
        check_kinds(
            model,
            checkpoint,
            missing="error",
            rename=rename,
            conversions=conversions,
            buffers=None,
            staging_bytes=staging_bytes,
        )
        reshard(model)
        _refuse_meta(entries_of(model))
        devices = {local_of(e.tensor).device.type for e in entries_of(model) if e.role != "attribute"}
        staging = staging_bytes or default_staging_bytes("cpu" if devices <= {"cpu"} else "accelerator")
        check.same = comparable_structure(
            Structure.of(entries_of(model)),
            argument_lines(checkpoint=kind_of_checkpoint(checkpoint, agreement), staging_bytes=staging),
            remedy="Pass the same model and arguments on every rank.",
        )
    with agreement.whole_call():
        opened = open_source(checkpoint, agreement=agreement)
    source = opened.source
    with agreement.phase("match names") as match:
        if isinstance(source, RemoteSource) or is_in_memory(source):
            what = "values in memory" if is_in_memory(source) else "some that this rank does not see"
            raise ConfigurationError(
                f"verify_shards: expected safetensors files that every rank can read, got {what}."
            )
        entries = entries_of(model)
        layouts = agreed_layouts(entries, agreement=agreement)
        binding = bind(model, entries, source, rename=rename, conversions=conversions)
        if binding.absent and not binding.bound:
            raise CheckpointError(
                f"{source.name}: expected tensors of the model, of which it has {listed(binding.absent)}, got "
                f"{listed(sorted(source.tensors))}: nothing would be compared. Pass rename= if the names differ, or the checkpoint "
                "that belongs to the model."
            )
        check_bound(entries, binding.bound)
        by_fqn = {e.fqn: e for e in entries if e.role != "attribute" and e.fqn in binding.bound}
        held = {fqn: binding.bound[fqn] for fqn in by_fqn}
        for (
            alias
        ) in binding.aliases:  # a tied tensor must be what the checkpoint holds under each of its names
            by_fqn[alias.fqn], held[alias.fqn] = by_fqn[alias.of], alias.bound
        wanted = [
            WantedTensor(
                fqn=fqn,
                shape=held[fqn].shape,
                dtype=entry.tensor.dtype,
                layout=layouts[entry.fqn],
                pieces=held[fqn].pieces,
                partial=False,
                may_map=False,
            )
            for fqn, entry in by_fqn.items()
            if held[fqn].whole is None
        ]
        pairs = {(each.stored.dtype, tensor.dtype) for tensor in wanted for each in tensor.pieces}
        casts = tuple(
            sorted(f"{dtype_name(stored)} to {dtype_name(kept)}" for stored, kept in pairs if stored != kept)
        )
        converted = [
            ConvertedTensor(
                fqn=fqn,
                name=held[fqn].name,
                whole=whole,
                dtype=entry.tensor.dtype,
                layout=layouts[entry.fqn],
            )
            for fqn, entry in by_fqn.items()
            if (whole := held[fqn].whole) is not None
        ]
        match.same = comparable_lines(
            "what is to be read",
            list(Wanted(source=source, pieces=tuple(wanted), converted=tuple(converted)).lines()),
            remedy="Pass the same checkpoint, rename and conversions on every rank.",
        )
    with ExitStack() as stack, agreement.phase("compare"):
        if not isinstance(checkpoint, Source):
            stack.callback(source.close)
        targets = {fqn: local_of(entry.tensor) for fqn, entry in by_fqn.items()}
        plane = None
        if converted and len(ranks) > 1:  # before a rank can fail to read: see `execute`
            device = next(iter(targets.values())).device
            plane = stack.enter_context(open_data_plane(ranks, device=device, agreement=agreement))
        plan = plan_reads(wanted, rank=agreement.rank, max_read_bytes=read_bytes_of(staging))
        differing: dict[str, list[tuple[tuple[int, ...], int, str, str]]] = {}

        def compare(fragment: Fragment, elements: torch.Tensor) -> None:
            piece = fragment.piece
            count, first = _differing(place_in(targets[fragment.fqn], piece), elements)
            if count:
                differing.setdefault(fragment.fqn, []).append(
                    (piece.place_of(first), count, fragment.stored.name, fragment.stored.file)
                )

        Reading(
            plan,
            source=source,
            ring=StagingRing(count=RING_BUFFERS, nbytes=read_bytes_of(staging), device=torch.device("cpu")),
            agreement=agreement,
            done=lambda _: None,
            place=fragment_by_fragment(compare),
            in_place=None,
        ).run()
        storage_bytes = plan.storage_bytes
        if converted:
            steps = plan_conversions(
                converted,
                ranks=ranks,
                readers=ranks,
                rank=agreement.rank,
                buffer_bytes=staging // EXCHANGE_BUFFERS,
            )
            for step in steps:
                made = {fqn: torch.empty_like(targets[fqn]) for fqn in step.exchange.arriving}
                with awaited(source, agreement, name=source.name) as bounded:
                    convert(
                        [step],
                        bounded,
                        place=made,
                        plane=plane,
                        agreement=agreement,
                        done=lambda _: None,
                    )
                for fqn, shard in made.items():
                    count, at = _differing(targets[fqn], shard)
                    if count:
                        first_source = binding.bound[fqn].stored[0]
                        differing[fqn] = [(at, count, first_source.name, first_source.file)]
            storage_bytes += sum(
                source_bytes_of(step.whole, source) for step in steps if step.whole is not None
            )
        require_unchanged(source, agreement)
        own = []
        for fqn, found in differing.items():
            first, _, name, file = min(found)
            own.append([fqn, name, file, sum(count for _, count, _, _ in found), first])
        texts = agreement.gather("differences", json.dumps([storage_bytes, own]))
    gathered = [json.loads(text) for text in texts]
    return VerifyReport(
        checkpoint=source.name,
        tensors=len(by_fqn),
        storage_bytes=sum(of_rank[0] for of_rank in gathered),
        absent=binding.absent,
        mismatches=tuple(
            Mismatch(
                fqn=fqn, checkpoint_name=name, file=file, rank=rank, elements=count, first_index=tuple(first)
            )
            for rank, (_, found) in zip(ranks, gathered, strict=True)
            for fqn, name, file, count, first in found
        ),
        casts=casts,
    )


def _refuse_meta(entries: Sequence[Entry]) -> None:
    empty = [entry.fqn for entry in entries if entry.role == "parameter" and entry.tensor.is_meta]
    if empty:
        raise LeftOnMetaError(
            f"verify_shards: expected a model with values, got {listed(empty)} on meta. Call it after wrap_model or materialize."
        )


def _counted(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _differing(shard: torch.Tensor, stored: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """Return how many elements differ in their bytes, and the index of the first."""
    with torch.no_grad():
        expected = stored.to(device=shard.device, dtype=shard.dtype).contiguous()
        size = shard.element_size()
        got_bytes = shard.contiguous().view(-1).view(torch.uint8).view(-1, size)
        differs = (got_bytes != expected.view(-1).view(torch.uint8).view(-1, size)).any(1)
    count = int(differs.sum())
    if not count:
        return 0, ()
    position, index = int(differs.to(torch.uint8).argmax()), []
    for length in reversed(shard.shape):
        position, at = divmod(position, length)
        index.append(at)
    return count, tuple(reversed(index))
