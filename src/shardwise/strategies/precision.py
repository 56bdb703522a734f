"""Compute and reduce dtypes of a strategy."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from shardwise.errors import ConfigurationError, did_you_mean

MIXED_PRECISIONS = ("no", "bf16", "fp16", "fp8")
_OTHER_WORDS = {
    "none": "no",
    "false": "no",
    "fp32": "no",
    "float32": "no",
    "bfloat16": "bf16",
    "torch.bfloat16": "bf16",
    "float16": "fp16",
    "torch.float16": "fp16",
    "half": "fp16",
    "float8": "fp8",
}


def check_mixed_precision(mixed_precision: str, *, device_type: str) -> None:
    """Refuse a precision that is unknown or not possible on a device.

    Raises:
        ConfigurationError: With the list, or the reason.
    """
    if mixed_precision not in MIXED_PRECISIONS:
        raise ConfigurationError(
            f"mixed_precision: expected one of {', '.join(MIXED_PRECISIONS)}, got {mixed_precision!r}."
            f"{did_you_mean(mixed_precision, MIXED_PRECISIONS, other_words=_OTHER_WORDS)}"
        )
    if mixed_precision == "fp16" and device_type == "cpu":
        raise ConfigurationError(
            "mixed_precision='fp16': needs an accelerator and its gradient scaler, got a mesh on the CPU. Use 'bf16' or 'no'."
        )


def policy_of(mixed_precision: str) -> MixedPrecisionPolicy:
    """Return FSDP2's policy: compute in the precision, reduce gradients in float32."""
    compute = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
    if compute is None:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
