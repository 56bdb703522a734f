"""Memory that could not be had, named for what it is."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shardwise.errors import OutOfMemoryError

_OF_TORCHS_HOST_ALLOCATOR = ("can't allocate memory", "not enough memory")


@contextmanager
def naming_out_of_memory(what: str, *, device: torch.device, rank: int) -> Iterator[None]:
    """Turn torch's and the system's refusals in the body into our error.

    Args:
        what: Is allocated.
        device: On which most of it lies.
        rank: This one, global.

    Raises:
        OutOfMemoryError: Naming device, rank, host and remedy; torch's own text has the bytes.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_host = isinstance(error, MemoryError) or any(
            text in str(error) for text in _OF_TORCHS_HOST_ALLOCATOR
        )
        if isinstance(error, OutOfMemoryError) or not (is_host or isinstance(error, torch.OutOfMemoryError)):
            raise
        where = "host memory" if is_host else f"memory on {device}"
        remedy = (
            "Use more ranks or nodes, fewer ranks on this node, cpu_storage='map', or a smaller dtype."
            if is_host
            else "Use more ranks, a smaller dtype, fsdp_config={'cpu_offload': True}, or free what this process holds there."
        )
        raise OutOfMemoryError(
            f"{what}: expected {where} for them on rank {rank} ({socket.gethostname()}), got {str(error).strip().rstrip('.')}. {remedy}"
        ) from error
