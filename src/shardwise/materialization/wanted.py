"""What of a model comes from which source; ranks compare it before they read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from shardwise.checkpoint import Source
from shardwise.materialization.binding import Bound
from shardwise.materialization.convert import ConvertedTensor
from shardwise.materialization.cpu_storage import CpuStorage
from shardwise.materialization.storage import mappable_parameters
from shardwise.materialization.structure import Entry
from shardwise.plan import Layout, WantedTensor


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


def _of_layout(layout: Layout) -> str:
    return f"{layout.placements} on {layout.mesh_shape}"
