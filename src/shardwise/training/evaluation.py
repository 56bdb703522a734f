"""The loss over rows that are not trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from shardwise.training.loss import IGNORED, summed_loss
from shardwise.training.tokens import TokenRows
from shardwise.transformers_model import TransformersModel


def evaluate(
    model: TransformersModel,
    data: TokenRows,
    rows: range,
    *,
    rows_of_pass: int,
    is_stop_wanted: Callable[[], bool],
) -> float | None:
    """Return the mean loss over the predicted tokens of some rows; None where it was stopped. All ranks call this together.

    Args:
        model: With values.
        data: That the rows are of.
        rows: At least one.
        rows_of_pass: That a rank does at once.
        is_stop_wanted: Asked before each pass, on all ranks together; says the same on all.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = list(rows[rank::ranks])
    device = model.strategy.device_mesh.device_type
    total = torch.zeros((), device=device)
    passes = -(
        -len(rows[::ranks]) // rows_of_pass
    )  # of the first rank, which has the most rows: all gather layers alike
    for number in range(passes):
        if is_stop_wanted():
            return None
        # A rank that has no row left runs one all the same, and counts nothing of it.
        part = own[number * rows_of_pass : (number + 1) * rows_of_pass]
        tokens, labels = data.batch(part or [rows[0]])
        if not part:
            labels.fill_(IGNORED)
        outputs = model.forward_only(input_ids=tokens, use_cache=False)
        total += summed_loss(outputs.logits, labels)
    dist.all_reduce(total)
    return float(total) / max(1, data.predicted(list(rows)))
