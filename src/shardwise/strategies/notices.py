"""What works and yet surprises; said once, on the source rank."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.errors import listed
from shardwise.materialization import entries_of
from shardwise.tensors import dtype_name

_log = logging.getLogger("shardwise")

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def warn_of_half_masters(model: nn.Module, optimizers: Sequence[Optimizer], *, mixed_precision: str) -> None:
    """Warn if an optimizer updates parameters in the dtype that mixed precision would only compute in.

    A bf16 number has 8 bits of precision: an update below 1/512 of a weight is rounded away.

    Args:
        model: Wrapped.
        optimizers: Whose groups hold its parameters.
        mixed_precision: Of the strategy.
    """
    if mixed_precision not in _HALF:
        return
    trained = {
        id(p) for o in optimizers for group in o.param_groups for p in group["params"] if p.requires_grad
    }
    half = [
        entry
        for entry in entries_of(model)
        if entry.role == "parameter" and id(entry.tensor) in trained and entry.tensor.dtype in _HALF.values()
    ]
    if half:
        _log.warning(
            "the optimizer updates parameters that are stored in %s (%s): updates much smaller than a weight, as with "
            "AdamW and a learning rate of 1e-5, are rounded away. Pass dtype=torch.float32 to load_pretrained; "
            "mixed_precision=%r still computes in %s.",
            dtype_name(half[0].tensor.dtype),
            listed([entry.fqn for entry in half]),
            mixed_precision,
            dtype_name(_HALF[mixed_precision]),
        )


def warn_of_one_rank() -> None:
    """Say that nothing was sharded, and how to start several ranks."""
    _log.warning(
        "wrap_model: the mesh has one rank, which holds the whole model. To shard it, start several: torchrun --nproc-per-node N, or "
        "accelerate launch --use_fsdp --fsdp_version 2 --num_processes N, which starts one process on the CPU without --use_fsdp."
    )
