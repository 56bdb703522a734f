"""Compute and reduce dtypes of a strategy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

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


def check_native_precision(mixed_precision: str, *, device_type: str) -> None:
    """Refuse a precision that is unknown, or not possible on a device with torch alone.

    Raises:
        ConfigurationError: With the list, or the reason.
    """
    check_mixed_precision(mixed_precision, device_type=device_type)
    if mixed_precision == "fp8":
        raise ConfigurationError(
            "mixed_precision='fp8': NativeFSDPStrategy has no fp8 kernels. Use AccelerateStrategy with an fp8 backend "
            "installed, or 'bf16'."
        )


def check_fp8(mixed_precision: str, *, device_type: str, efficient: bool) -> None:
    """Refuse fp8 where Accelerate cannot convert layers to it.

    Raises:
        ConfigurationError: With the reason.
    """
    if mixed_precision != "fp8":
        return
    if device_type == "cpu":
        raise ConfigurationError(
            "mixed_precision='fp8': needs an accelerator, got a mesh on the CPU. Use 'bf16' or 'no'."
        )
    if efficient:
        raise ConfigurationError(
            "mixed_precision='fp8': Accelerate converts layers of a model that holds its values, which "
            "memory_efficient_init does not keep. Pass memory_efficient_init=False, or use 'bf16'."
        )


def check_grad_scaler(grad_scaler_config: Mapping[str, Any] | None, *, mixed_precision: str) -> None:
    """Refuse options of a gradient scaler where there is none, and unknown ones.

    Raises:
        ConfigurationError: With the remedy.
    """
    if grad_scaler_config is None:
        return
    if mixed_precision != "fp16":
        raise ConfigurationError(
            f"grad_scaler_config: expected mixed_precision='fp16', got {mixed_precision!r}, where gradients are not scaled. "
            "Leave grad_scaler_config out."
        )
    known = [name for name in inspect.signature(torch.amp.GradScaler).parameters if name != "device"]
    unknown = sorted(set(grad_scaler_config) - set(known))
    if unknown:
        raise ConfigurationError(
            f"grad_scaler_config: unknown keys {', '.join(unknown)}. Known keys: {', '.join(known)}."
        )


def policy_of(mixed_precision: str) -> MixedPrecisionPolicy:
    """Return FSDP2's policy: compute in the precision, reduce gradients in float32."""
    compute = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
    if compute is None:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
