"""What an export writes, and from where: tensors of files, and the ranks' parts of the model that they are taken from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from shardwise.checkpoint import StoredTensor
from shardwise.conversion import SavedTensor
from shardwise.errors import ConfigurationError
from shardwise.export.file_plan import FilePlan
from shardwise.plan import Layout, StoredPiece, WantedTensor, unwritten


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """All tensors of an export.

    Args:
        saved: To be written, in order.
        files: That they are written to.
        held: Tensors of the model by each of their names: shape, and the dtype in which they are written.
        shards: This rank's part of each, by the same names.
        layouts: How each lies over the ranks, by the same names; equal on all ranks.
    """

    saved: tuple[SavedTensor, ...]
    files: FilePlan
    held: Mapping[str, StoredTensor]
    shards: Mapping[str, torch.Tensor]
    layouts: Mapping[str, Layout]

    @property
    def whole(self) -> tuple[str, ...]:
        """Checkpoint names of the tensors that a conversion makes of whole ones."""
        return tuple(each.name for each in self.saved if each.whole is not None)

    @property
    def nbytes(self) -> int:
        """Of all tensors that are written."""
        return sum(of.nbytes for of in self.files.stored.values())

    def wanted(self) -> list[WantedTensor]:
        """Return what the files want of the model: one entry for each tensor that is written and each that it takes from.

        Raises:
            ConfigurationError: Pieces do not make up a tensor; nothing was written.
        """
        found = []
        for each in self.saved:
            pieces: dict[str, list[StoredPiece]] = {}
            for taken in each.taken:
                stored = StoredPiece(stored=self.files.stored[each.name], piece=taken.piece)
                pieces.setdefault(taken.fqn, []).append(stored)
            for fqn, of_tensor in pieces.items():
                found.append(
                    WantedTensor(
                        fqn=fqn,
                        shape=self.held[fqn].shape,
                        dtype=self.held[fqn].dtype,
                        layout=self.layouts[fqn],
                        pieces=tuple(of_tensor),
                        partial=True,
                        may_map=False,
                    )
                )
        sizes = {each.name: torch.Size(each.shape).numel() for each in self.saved if each.whole is None}
        for name, count in unwritten(found, sizes).items():
            raise ConfigurationError(
                f"{name}: expected pieces of the model for {sizes[name]} elements, got {count}. Nothing was written; report this "
                "model to shardwise."
            )
        return found

    def lines(self) -> Iterator[str]:
        """Yield lines that are equal exactly where ranks would write the same."""
        yield from self.files.lines()
        for each in self.saved:
            if each.whole is not None:
                yield f"{each.name}: by {each.whole.group.operations} of {', '.join(each.whole.group.source_names)}"
            for taken in each.taken:
                yield f"{each.name}: {taken.fqn} in {self.layouts[taken.fqn]}, {taken.piece}"
