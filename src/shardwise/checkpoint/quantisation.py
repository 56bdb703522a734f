"""Checkpoints whose weights are not what their names say until scales are applied."""

from __future__ import annotations

import json
from pathlib import Path

from shardwise.checkpoint.regular_file import read_text
from shardwise.errors import DamagedFileError, UnsupportedFormatError

_MAX_CONFIG_BYTES = 20_000_000


def refuse_quantised(directory: Path) -> None:
    """Raise if a checkpoint's config says that it is quantised.

    Raises:
        UnsupportedFormatError: Naming the method.
        CheckpointError: config.json is not JSON, or cannot be read.
    """
    path = directory / "config.json"
    if not path.exists():
        return
    try:
        config = json.loads(read_text(path, most_bytes=_MAX_CONFIG_BYTES, what="a config"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: expected JSON, got {error}. Get the file again.") from error
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if not found:
        return
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method is None and isinstance(found, dict):
        method = next((name for name in ("load_in_4bit", "load_in_8bit") if found.get(name)), None)
    raise UnsupportedFormatError(
        f"{path}: expected an unquantised checkpoint, got quantization_config with method {method or found!r}. Its weights need "
        "their scales, which shardwise does not apply. Use the unquantised checkpoint, or load this one with transformers, "
        "dequantise it and save it with save_pretrained."
    )
