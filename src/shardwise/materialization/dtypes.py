"""In which dtype each tensor of a model is kept: one answer for parameters that are read and for those that are initialised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from shardwise.materialization.binding import Bound
from shardwise.materialization.structure import Entry


def kept_dtypes(
    entries: Sequence[Entry], bound: Mapping[str, Bound], dtype: torch.dtype | str | None
) -> dict[str, torch.dtype]:
    """Return the dtype of each parameter and buffer, by fqn.

    Args:
        entries: Of the model.
        bound: Where values are, by fqn.
        dtype: Of floating point parameters on meta, but for those of one byte: None keeps the model's, a torch dtype counts for all of them, and
            "auto" takes what is stored; for parameters that are not stored, what most of the stored ones have.
    """
    of_stored: dict[str, torch.dtype] = {}
    chosen = [entry for entry in entries if _may_choose(entry)]
    if dtype == "auto":
        for entry in chosen:
            of = bound.get(entry.fqn)
            if of is not None and of.stored:
                of_stored[entry.fqn] = of.stored[0].dtype
    common = Counter(each for each in of_stored.values() if each.is_floating_point).most_common(1)
    kept = {entry.fqn: entry.tensor.dtype for entry in entries if entry.role != "attribute"}
    for entry in chosen:
        if isinstance(dtype, torch.dtype):
            kept[entry.fqn] = dtype
        elif entry.fqn in of_stored:
            kept[entry.fqn] = of_stored[entry.fqn]
        elif common and dtype == "auto":
            kept[entry.fqn] = common[0][0]
    return kept


def _may_choose(entry: Entry) -> bool:
    # Of one byte they are codes of a quantised weight, which mean nothing without its scales in another dtype.
    of_numbers = entry.tensor.is_floating_point() and entry.tensor.itemsize > 1
    return entry.role == "parameter" and entry.tensor.is_meta and of_numbers
