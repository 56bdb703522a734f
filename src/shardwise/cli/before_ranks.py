"""What can be found wrong with a command's arguments on this machine, before ranks are started for it."""

from __future__ import annotations

import os
from pathlib import Path

from shardwise.errors import CheckpointError, ConfigurationError


def check_checkpoint(name: str) -> None:
    """Raise what ranks would raise of a path without a checkpoint.

    A rank of a launcher passes: others may see what it does not, and they agree on that. Of a hub id only the spelling is looked at.

    Args:
        name: Directory, file or hub id.

    Raises:
        CheckpointError: There is no such path and the name cannot be a hub id; or it has no safetensors files.
    """
    from shardwise.checkpoint import locate, require_files
    from shardwise.compare.launch import is_rank

    if not is_rank(os.environ):
        path = locate(name).path
        if path is not None:
            require_files(path)


def check_exported(source: str) -> None:
    """Raise unless there is something of this name to export: a path, or a model of a hub.

    A rank of a launcher passes, as above. Of a model of a hub that is not on this machine the descriptions are fetched, which ranks need too.

    Args:
        source: A saved training or a model, directory or hub id.

    Raises:
        ConfigurationError: There is none.
        CheckpointError: It is a path that has no safetensors files.
    """
    from shardwise.checkpoint import fetch_descriptions, locate
    from shardwise.compare.launch import is_rank

    if is_rank(os.environ):
        return
    try:
        location = locate(source)
        if location.path is None:
            fetch_descriptions(location)
    except CheckpointError as error:
        raise ConfigurationError(
            f"export: expected a training's checkpoint or a model, got neither. {error}"
        ) from error
    check_checkpoint(source)


def check_data(path: Path) -> None:
    """Raise what ranks would raise of a file of training data, if it cannot be read or its first record is none.

    Raises:
        DataError: Naming the file.
    """
    from shardwise.compare.launch import is_rank
    from shardwise.training.records import read_records

    if not is_rank(os.environ):
        next(read_records(path), None)


def check_strategy_options(strategy: str, *, mixed_precision: str, ranks: int) -> None:
    """Raise what ranks would raise of a strategy that there is not, or that cannot be had here.

    Args:
        strategy: Its name.
        mixed_precision: Compute dtype.
        ranks: That this machine would start; a launcher's are as many as it says.

    Raises:
        ConfigurationError: One of them is unknown, or not possible on the devices that the ranks will have.
        MissingDependencyError: Naming the extra.
    """
    from shardwise.compare.devices import accelerator_of_ranks, launched_ranks_here
    from shardwise.compare.launch import is_rank
    from shardwise.strategies import check_strategy_here

    accelerator = accelerator_of_ranks(launched_ranks_here() if is_rank(os.environ) else ranks)
    check_strategy_here(
        strategy,
        mixed_precision=mixed_precision,
        device_type="cpu" if accelerator is None else accelerator.type,
    )


def check_beginning(output_directory: Path, *, resume: str | None) -> None:
    """Raise what ranks would raise of a training that begins where another one has checkpoints.

    A rank of a launcher passes: others may see what it does not.

    Raises:
        ConfigurationError: Naming the newest.
    """
    from shardwise.compare.launch import is_rank
    from shardwise.training import CHECKPOINTS, newest_first, refuse_checkpoints

    if not is_rank(os.environ) and resume is None:
        folder = output_directory.absolute() / CHECKPOINTS
        refuse_checkpoints(folder, newest_first(folder))
