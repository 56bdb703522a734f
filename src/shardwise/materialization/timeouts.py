"""How long a call waits for other ranks."""

from __future__ import annotations

import math
from datetime import timedelta

import torch.distributed as dist

from shardwise.errors import ConfigurationError


def timeout_seconds_of(timeout: float | timedelta | None, *, group: dist.ProcessGroup | None) -> float:
    """Return a timeout in seconds.

    Args:
        timeout: Seconds or a timedelta; None is the group's own timeout, that of `init_process_group(timeout=...)`.
        group: None is the default one.

    Raises:
        ConfigurationError: It is not a time, or not above 0.
    """
    if timeout is None:
        return _seconds_of_group(group)
    if not isinstance(timeout, (int, float, timedelta)) or isinstance(timeout, bool):
        raise ConfigurationError(
            f"timeout: expected seconds as a number, a timedelta, or None for the process group's own, got {timeout!r}"
        )
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    if not 0 < seconds < math.inf:
        raise ConfigurationError(f"timeout: expected a time above 0 s with an end, got {timeout!r}")
    return seconds


def _seconds_of_group(group: dist.ProcessGroup | None) -> float:
    """Return the longest timeout of a group's back ends; torch's default where a back end does not tell."""
    default = dist.distributed_c10d.default_pg_timeout
    if not dist.is_initialized():
        return default.total_seconds()
    chosen = group if group is not None else dist.group.WORLD
    found = []
    # torch has no public way to ask; `torch.distributed.distributed_c10d._set_pg_timeout` goes the same way.
    for device in chosen._device_types:  # type: ignore[union-attr]
        try:
            found.append(chosen._get_backend(device).options._timeout)  # type: ignore[union-attr]
        except (AttributeError, RuntimeError):
            continue
    return max(found, default=default).total_seconds()
