"""Figures of each step: appended to a file of JSON lines, and shown by TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from shardwise.checkpoint import write_whole

METRICS_NAME: Final = "metrics.jsonl"


class Metrics:
    """The figures of one training, written by one rank.

    Args:
        directory: Of the training.
        steps: That were taken; lines of later ones, of a run that was cut short, are removed.
    """

    def __init__(self, directory: Path, *, steps: int) -> None:
        self._path = directory / METRICS_NAME
        write_whole(self._path, "".join(_kept_lines(self._path, steps)))
        self._board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=steps + 1)

    def add(self, figures: Mapping[str, Any]) -> None:
        """Append one line; it is there whole or not at all, whoever ends this process.

        Args:
            figures: With `step`; what JSON can hold.
        """
        line = (json.dumps(dict(figures)) + "\n").encode()
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)  # one call, so that readers see no half of it
        finally:
            os.close(file)
        if self._board is not None:
            for name, value in figures.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, figures["step"])

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self._board is not None:
            self._board.close()


def _kept_lines(path: Path, steps: int) -> list[str]:
    if not path.is_file() or not steps:
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue  # the end of a file system that was full
        if step <= steps:
            kept.append(line)
    return kept
