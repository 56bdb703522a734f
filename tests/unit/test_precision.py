"""Compute and reduce dtypes."""

from __future__ import annotations

import pytest
import torch

from shardwise.errors import ConfigurationError
from shardwise.strategies.precision import MIXED_PRECISIONS, check_mixed_precision, policy_of
from shardwise.tensors import dtype_name


@pytest.mark.parametrize("mixed_precision", MIXED_PRECISIONS)
def test_accelerators_may_take_any_known_precision(mixed_precision: str) -> None:
    check_mixed_precision(mixed_precision, device_type="cuda")


@pytest.mark.parametrize(
    ("mixed_precision", "meant"),
    [
        ("", None),
        ("int8", None),
        ("fp32", "no"),
        (None, "no"),
        (False, "no"),
        ("bfloat16", "bf16"),
        ("BF16", "bf16"),
        ("bfl6", "bf16"),
        (torch.bfloat16, "bf16"),
        ("float16", "fp16"),
    ],
)
def test_an_unknown_precision_is_refused_with_the_list(mixed_precision: str, meant: str | None) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_mixed_precision(mixed_precision, device_type="cpu")
    assert str(caught.value) == (
        f"mixed_precision: expected one of no, bf16, fp16, fp8, got {mixed_precision!r}."
        + (f" Did you mean {meant!r}?" if meant else "")
    )


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_cpu_takes_no_and_bf16(mixed_precision: str) -> None:
    check_mixed_precision(mixed_precision, device_type="cpu")


def test_fp16_is_refused_on_the_cpu() -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_mixed_precision("fp16", device_type="cpu")
    assert str(caught.value) == (
        "mixed_precision='fp16': needs an accelerator and its gradient scaler, got a mesh on the CPU. Use 'bf16' or 'no'."
    )


@pytest.mark.parametrize(
    ("mixed_precision", "compute", "reduce"),
    [
        ("no", None, None),
        ("bf16", torch.bfloat16, torch.float32),
        ("fp16", torch.float16, torch.float32),
    ],
)
def test_gradients_are_reduced_in_float32(
    mixed_precision: str, compute: torch.dtype | None, reduce: torch.dtype | None
) -> None:
    policy = policy_of(mixed_precision)
    assert (policy.param_dtype, policy.reduce_dtype) == (compute, reduce)
    assert policy.output_dtype is None


def test_a_dtype_has_its_bare_name() -> None:
    assert [dtype_name(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn)] == [
        "bfloat16",
        "float8_e4m3fn",
    ]
