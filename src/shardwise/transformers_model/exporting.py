"""Export: what the facade writes for others to load."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shardwise.export import ExportReport
from shardwise.export.export import export_agreed
from shardwise.transformers_model.resume import MODEL_PREFIX
from shardwise.transformers_model.resuming import Resuming
from shardwise.transformers_model.saved_chunks import saved_chunks

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
            CheckpointError: The directory is there already, or cannot be written to; nothing has changed there.
            RankError: Ranks differ, one failed, or one did not arrive.
        """
        if state is None:
            self._wrap()
            self._refuse_blank("export")
        # After the wrap: what a call keeps in the store is forgotten when a later one begins.
        agreement = self._agree("export")
        chunks = None
        if state is not None:
            with agreement.phase("look at the state"):
                chunks = saved_chunks(Path(state).absolute(), prefix=MODEL_PREFIX)
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
