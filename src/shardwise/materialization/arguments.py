"""What ranks must pass alike, as lines of text that they compare before their ways part."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shardwise.materialization.agreement import Agreement
from shardwise.materialization.structure import Entry

_STATE_DICT, _NOTHING = "a state dict", "None"


def kind_of_checkpoint(checkpoint: Any, agreement: Agreement) -> str:
    """Return what kind of checkpoint this rank takes part with. All ranks call this together.

    Of a state dict the first rank's values count, so the others may pass None or an empty one, as they do to torch's own
    `broadcast_from_rank0`.
    """
    if isinstance(checkpoint, Mapping):
        kind = _STATE_DICT
    elif checkpoint is None:
        kind = _NOTHING
    else:
        kind = "a path or hub id" if isinstance(checkpoint, (str, os.PathLike)) else "a source"
    is_first = agreement.rank == agreement.ranks[0]
    of_first = agreement.publish("kind of checkpoint", kind if is_first else None)
    return of_first if of_first == _STATE_DICT and kind == _NOTHING else kind


def checkpoint_of(checkpoint: Any, kind: str) -> Any:
    """Return what this rank opens: nothing where it takes part in another rank's state dict."""
    return {} if checkpoint is None and kind == _STATE_DICT else checkpoint


def argument_lines(**arguments: Any) -> tuple[str, ...]:
    """Return a line for each argument of a call."""
    return tuple(f"option {name}: {_as_text(value)}" for name, value in arguments.items())


def storage_lines(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield a line for each parameter that says whether it has storage: that decides what is mapped, and cast."""
    for entry in entries:
        if entry.role == "parameter":
            yield f"{entry.fqn} {'is on meta' if entry.tensor.is_meta else 'has storage'}"


def _as_text(value: Any) -> str:
    return str(list(value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
