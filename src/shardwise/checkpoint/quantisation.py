"""Checkpoints whose weights are not what their names say until scales are applied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardwise.checkpoint.regular_file import read_text
from shardwise.errors import DamagedFileError, UnsupportedFormatError

_MAX_CONFIG_BYTES = 20_000_000
_OTHER_REMEDY = (
    "Use the unquantised checkpoint, or one that was dequantised and saved with save_pretrained: "
    "its library's documentation says how."
)
_MADE_FROM = "transformers cannot dequantise it: use the unquantised model that it was made from."
# What transformers 5 offers, by the method's name in config.json. Source: `transformers.utils.quantization_config`.
_REMEDY_OF = {
    "gptq": _MADE_FROM,
    "awq": _MADE_FROM,
    "bitsandbytes": (
        "Use the unquantised model that it was made from, or load this one with transformers, call model.dequantize() and save it "
        "with save_pretrained."
    ),
} | {
    method: (
        f"Use the unquantised model if there is one, or load this one with transformers 5 and quantization_config="
        f"{config}(dequantize=True), and save it with save_pretrained."
    )
    for method, config in {
        "fp8": "FineGrainedFP8Config",
        "compressed-tensors": "CompressedTensorsConfig",
        "mxfp4": "Mxfp4Config",
    }.items()
}


def refuse_quantised(directory: Path) -> None:
    """Raise if a checkpoint's config says that it is quantised.

    Raises:
        UnsupportedFormatError: Naming the method and what can be done about it.
        CheckpointError: config.json is not JSON, or cannot be read.
    """
    path = directory / "config.json"
    if not path.exists():
        return
    try:
        config = json.loads(read_text(path, most_bytes=_MAX_CONFIG_BYTES, what="a config"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: expected JSON, got {error}. Get the file again.") from error
    found = _quantisation_of(config)
    if not found:
        return
    method = _method_of(found)
    raise UnsupportedFormatError(
        f"{path}: expected an unquantised checkpoint, got quantization_config with method {method or found!r}. Its weights need "
        f"their scales, which shardwise does not apply. {_REMEDY_OF.get(method or '', _OTHER_REMEDY)}"
    )


def _quantisation_of(config: Any) -> Any:
    """Return what a config says of the whole model, or else of a part, as `text_config` of an image model does."""
    if not isinstance(config, dict):
        return None
    parts = (part for part in config.values() if isinstance(part, dict))
    return next(
        (of["quantization_config"] for of in (config, *parts) if of.get("quantization_config")),
        None,
    )


def _method_of(found: Any) -> str | None:
    if not isinstance(found, dict):
        return None
    if "quant_method" not in found and any(found.get(f"load_in_{bits}bit") for bits in (4, 8)):
        return "bitsandbytes"  # as it was written before methods had names
    method = found.get("quant_method")
    return method if isinstance(method, str) else None
