"""On which devices the ranks of a command compute."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def launched_ranks_here() -> int:
    """Return how many ranks the launcher of this one has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))


def accelerator_of_ranks(local_ranks: int) -> torch.device | None:
    """Return the accelerator of which each local rank can have one of its own; None where they compute on the CPU.

    Args:
        local_ranks: On this machine.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or torch.accelerator.device_count() < local_ranks:
        return None
    # An accelerator whose backend is the CPU's has no collectives of its own.
    return None if dist.get_default_backend_for_device(accelerator) == "gloo" else accelerator
