"""Export: what the facade writes for others to load."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shardwise.errors import CheckpointError
from shardwise.export import ExportReport
from shardwise.export.chunks import Chunks
from shardwise.export.export import export_agreed
from shardwise.materialization import Agreement
from shardwise.transformers_model.resume import MODEL_PREFIX
from shardwise.transformers_model.resuming import Resuming
from shardwise.transformers_model.saved_chunks import saved_chunks
from shardwise.transformers_model.sealed import RUN_NAME, find_fault

_AUTO = "auto"


class Exporting(Resuming):
    """The part of the facade that writes a checkpoint, and has the tokenizer that lies beside it."""

    _tokenizer: Any
    _load_tokenizer: Callable[[], Any]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer beside the model, read when it is first asked for; or what was passed; or None."""
        if isinstance(self._tokenizer, str) and self._tokenizer == _AUTO:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    def export(
        self,
        directory: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        tokenizer: Any = _AUTO,
        adapters: str | None = None,
        state: str | os.PathLike[str] | None = None,
        staging_bytes: int | None = None,
    ) -> ExportReport:
        """Write the model as a directory that `from_pretrained` loads, each rank its own part; wraps the model if no forward has.

        All ranks call this together. The training goes on as if nothing had happened.

        Args:
            directory: As for `export_checkpoint`, and so are the others.
            dtype: In which floating point tensors are written; None for the dtype of the shards.
            max_shard_size: Most bytes of tensors in one file.
            overwrite: Replace a directory of that name that holds a model.
            tokenizer: To save beside the weights; `"auto"` is `.tokenizer`.
            adapters: Of a model with adapters: `"alone"`, as None, writes these; `"merge"` writes the base with LoRA added to it.
            state: Write what `save` wrote into this directory, in place of the model's own values: nothing is wrapped, and no
                rank holds a shard, on any number of ranks. The model must be made as for `load`, without an optimizer.
            staging_bytes: Bound of the host buffers, in bytes.

        Returns:
            What was written, and what it did cost.

        Raises:
            CheckpointError: The directory is there already, or cannot be written to; nothing has changed there. Or the state is not
                what was saved, by its checksums.
            RankError: Ranks differ, one failed, or one did not arrive.
        """
        if state is None:
            self._wrap()
            self._refuse_blank("export")
        # After the wrap: what a call keeps in the store is forgotten when a later one begins.
        agreement = self._agree("export")
        chunks = None
        if state is not None:
            chunks = _whole_chunks(Path(state).absolute(), agreement)
        if isinstance(tokenizer, str) and tokenizer == _AUTO:
            with agreement.phase("tokenizer"):
                # The first rank alone saves it.
                tokenizer = self.tokenizer if agreement.rank == agreement.ranks[0] else None
        return export_agreed(
            self.model,
            Path(directory).absolute(),
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            tokenizer=tokenizer,
            adapters=adapters,
            staging_bytes=staging_bytes,
            agreement=agreement,
            chunks=chunks,
        )


def _whole_chunks(state: Path, agreement: Agreement) -> Chunks:
    """Return what was saved; its bytes are compared with the checksums that were written with them, by all ranks together."""
    with agreement.phase("look for the record"):
        is_first = agreement.rank == agreement.ranks[0]
        found = agreement.publish("is sealed", json.dumps((state / RUN_NAME).is_file()) if is_first else None)
    is_sealed: bool = json.loads(found)
    fault = find_fault(state, agreement=agreement) if is_sealed else None
    if fault is not None:
        raise CheckpointError(
            f"{state}: expected a whole checkpoint: {fault}. A training that resumes from it refuses it too: export one that is whole."
        )
    with agreement.phase("look at the state"):
        part = None if is_sealed else (agreement.ranks.index(agreement.rank), len(agreement.ranks))
        return saved_chunks(state, prefix=MODEL_PREFIX, part=part, step=agreement.step)
