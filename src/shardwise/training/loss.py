"""The loss of a causal language model, as a sum: a mean of means would depend on how rows are dealt out to ranks."""

from __future__ import annotations

import torch
from torch.nn import functional

IGNORED = -100  # as a label: the token is predicted by nobody


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of the cross entropies of all predicted tokens.

    Args:
        logits: `[rows, tokens, vocabulary]`; position t predicts token t + 1.
        labels: `[rows, tokens]`; `IGNORED` where a token is not to be predicted.

    Returns:
        A scalar in float32.
    """
    # The labels are shifted and not the logits, which would be copied.
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return functional.cross_entropy(
        logits.flatten(0, 1).float(),
        following.flatten().to(logits.device),
        ignore_index=IGNORED,
        reduction="sum",
    )
