"""A small random model for where the demo's real one cannot be had."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import torch

from shardwise.compare.announce import Progress
from shardwise.compare.cache import prepared_directory
from shardwise.compare.generated import generate_checkpoint
from shardwise.compare.generated_config import PRESETS

_PRESET: Final = "dense-small"
_SEED: Final = 0
_FILES: Final = 4


def small_random_model(progress: Progress) -> Path:
    """Return the directory of a random Qwen3-shaped checkpoint, written first where it is not in the cache.

    Raises:
        CommandError: The cache cannot be written.
    """

    def build(directory: Path) -> None:
        progress("writing a random Qwen3-shaped checkpoint")
        preset = PRESETS[_PRESET]
        written = generate_checkpoint(
            directory / _PRESET,
            config_kind=preset.config_kind,
            parameters=preset.parameters,
            dtype=torch.bfloat16,
            seed=_SEED,
            files=_FILES,
        )
        for path in written.directory.iterdir():
            path.rename(directory / path.name)
        shutil.rmtree(written.directory)

    return prepared_directory(f"random/{_PRESET}-seed{_SEED}", build=build, progress=progress)
