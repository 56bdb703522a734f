"""What an export writes, and from where: tensors of files, and the ranks' parts of the model that they are taken from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from shardwise.checkpoint import StoredTensor
from shardwise.conversion import SavedTensor
from shardwise.errors import ConfigurationError
from shardwise.export.file_plan import FilePlan
from shardwise.export.parts import Part, Terms
from shardwise.plan import StoredPiece, WantedTensor, unwritten


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """All tensors of an export.

    Args:
        saved: To be written, in order.
        files: That they are written to.
        held: Tensors of the model by each of their names: shape, and the dtype in which they are written.
        parts: That together are each of them, by the same names.
        shards: What this rank holds, by the parts' keys.
        terms: What is added to weights while they are written, by the first fqn of each.
        dtype: Of the model's floating point parameters, as a config names it; None where it has none.
        parts_of_fqn: The parts of every persistent tensor of the model, also of those that are only added, by first fqn.
    """

    saved: tuple[SavedTensor, ...]
    files: FilePlan
    held: Mapping[str, StoredTensor]
    parts: Mapping[str, tuple[Part, ...]]
    shards: Mapping[str, torch.Tensor]
    terms: Terms
    dtype: torch.dtype | None
    parts_of_fqn: Mapping[str, tuple[Part, ...]]

    @property
    def whole(self) -> tuple[str, ...]:
        """Checkpoint names of the tensors that a conversion makes of whole ones."""
        return tuple(each.name for each in self.saved if each.whole is not None)

    @property
    def nbytes(self) -> int:
        """Of all tensors that are written."""
        return sum(of.nbytes for of in self.files.stored.values())

    @property
    def fqn_of_key(self) -> dict[str, str]:
        """From a part's key to the first fqn of its tensor."""
        return {part.key: fqn for fqn, parts in self.parts_of_fqn.items() for part in parts}

    def wanted(self) -> list[WantedTensor]:
        """Return what the files want: one entry for each tensor that is written and each part that it takes from.

        Raises:
            ConfigurationError: Pieces do not make up a tensor; nothing was written.
        """
        found: list[WantedTensor] = []
        for each in self.saved:
            pieces: dict[str, list[StoredPiece]] = {}
            for taken in each.taken:
                stored = StoredPiece(stored=self.files.stored[each.name], piece=taken.piece)
                pieces.setdefault(taken.fqn, []).append(stored)
            for fqn, of_tensor in pieces.items():
                found += self.taken_from(fqn, of_tensor)
        sizes = {each.name: torch.Size(each.shape).numel() for each in self.saved if each.whole is None}
        for name, count in unwritten(found, sizes).items():
            raise ConfigurationError(
                f"{name}: expected pieces of the model for {sizes[name]} elements, got {count}. Nothing was written; report this "
                "model to shardwise."
            )
        return found

    def taken_from(self, fqn: str, pieces: Sequence[StoredPiece]) -> Iterator[WantedTensor]:
        """Yield what some pieces take of each part of a tensor of the model.

        Args:
            fqn: Of the tensor.
            pieces: Whose targets are places in it.
        """
        for part in self.parts[fqn]:
            inside = tuple(
                StoredPiece(stored=each.stored, piece=piece)
                for each in pieces
                for piece in each.piece.within(part.region)
            )
            if inside:
                yield WantedTensor(
                    fqn=part.key,
                    shape=part.region.shape,
                    dtype=self.held[fqn].dtype,
                    layout=part.layout,
                    pieces=inside,
                    partial=True,
                    may_map=False,
                )

    def lines(self) -> Iterator[str]:
        """Yield lines that are equal exactly where ranks would write the same."""
        yield from self.files.lines()
        for each in self.saved:
            if each.whole is not None:
                yield f"{each.name}: by {each.whole.group.operations} of {', '.join(each.whole.group.source_names)}"
            for taken in each.taken:
                yield f"{each.name}: {taken.fqn} in {self.parts[taken.fqn]}, {taken.piece}"
        for fqn, terms in self.terms.items():
            yield f"{fqn}: + {terms}"
