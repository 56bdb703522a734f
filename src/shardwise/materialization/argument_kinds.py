"""Arguments that are of no kind which a call takes: refused by name, before anything else is asked of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardwise.checkpoint import Source
from shardwise.errors import ConfigurationError


def check_kinds(
    model: object,
    checkpoint: object,
    *,
    missing: object,
    rename: object,
    conversions: object,
    buffers: object,
    staging_bytes: object,
) -> None:
    """Raise unless each argument is of a kind that `materialize` takes, under its name there.

    Raises:
        ConfigurationError: Naming the argument, what it may be, and what it is.
    """
    check_model(model)
    if checkpoint is not None and not isinstance(checkpoint, (str, os.PathLike, Mapping, Source)):
        raise _refused(
            "checkpoint", "a directory, a file, a hub id, a state dict, a Source or None", checkpoint
        )
    is_list = isinstance(missing, Sequence) and all(isinstance(pattern, str) for pattern in missing)
    if not isinstance(missing, str) and not is_list:
        raise _refused("missing", "'error', 'init', or patterns of names", missing)
    is_map = isinstance(rename, Mapping) and all(isinstance(n, str) for pair in rename.items() for n in pair)
    if rename is not None and not callable(rename) and not is_map:
        raise _refused("rename", "a mapping or a function from names to names, or None", rename)
    if conversions is not None and (not isinstance(conversions, Sequence) or isinstance(conversions, str)):
        raise _refused("conversions", "a list of transformers' conversions, or None", conversions)
    if buffers is not None and not callable(buffers) and not isinstance(buffers, Mapping):
        raise _refused("buffers", "a mapping from names to tensors, a function, or None", buffers)
    check_staging_bytes(staging_bytes)


def check_model(model: object) -> None:
    """Raise `ConfigurationError` unless a model is a module."""
    if not isinstance(model, nn.Module):
        raise _refused("model", "an nn.Module", model)


def check_staging_bytes(staging_bytes: object) -> None:
    """Raise `ConfigurationError` unless a bound of the staging buffers is a number of bytes, or None."""
    is_number = isinstance(staging_bytes, int) and not isinstance(staging_bytes, bool) and staging_bytes > 0
    if staging_bytes is not None and not is_number:
        raise _refused("staging_bytes", "a number of bytes above 0, or None", staging_bytes)


def check_group(group: object) -> None:
    """Raise unless a group is one that this rank is in, or None.

    Raises:
        ConfigurationError: It is not.
    """
    expected = "a ProcessGroup that this rank is in, or None"
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise _refused("group", expected, group)
    if group is not None:
        try:
            dist.get_process_group_ranks(group)
        except (KeyError, ValueError) as error:
            raise _refused("group", f"{expected}, that was not destroyed", group) from error


def checked_device(device: Any) -> torch.device:
    """Return a device that a user named.

    Raises:
        ConfigurationError: torch knows no such device.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"device: expected a torch device or its name, got {device!r}: {error}"
        ) from error


def _refused(name: str, expected: str, got: object) -> ConfigurationError:
    text = repr(got)
    return ConfigurationError(
        f"{name}: expected {expected}, got {text if len(text) <= 60 else f'{text[:60]}…'} ({type(got).__name__})."
    )
