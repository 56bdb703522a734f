"""Quantised checkpoints are refused by the name of their method, with what the user can do about this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shardwise as sw
from shardwise.errors import UnsupportedFormatError

# As their libraries write them: what config.json says, and what the message must have in it.
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True},
        ["gptq", "the unquantised model that it was made from"],
    ),
    "AWQ": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
        ["awq", "the unquantised model that it was made from"],
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        ["bitsandbytes", "model.dequantize()", "save_pretrained"],
    ),
    "bitsandbytes before it was named": (
        {"load_in_8bit": True, "llm_int8_threshold": 6.0},
        ["bitsandbytes", "model.dequantize()"],
    ),
    "block FP8": (
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        ["fp8", "FineGrainedFP8Config(dequantize=True)", "save_pretrained"],
    ),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        ["compressed-tensors", "CompressedTensorsConfig(dequantize=True)", "save_pretrained"],
    ),
    "MXFP4": (
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        ["mxfp4", "Mxfp4Config(dequantize=True)", "save_pretrained"],
    ),
    "a method of the future": (
        {"quant_method": "int3-of-tomorrow"},
        ["int3-of-tomorrow", "dequantised"],
    ),
    "no method at all": ({"bits": 4}, ["{'bits': 4}", "dequantised"]),
}


def model_on_meta() -> torch.nn.Module:
    return torch.nn.Linear(4, 4, bias=False, device="meta")


def saved(directory: Path, config: dict[str, Any]) -> Path:
    save_file({"weight": torch.ones(4, 4)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("case", CASES)
def test_the_method_and_its_remedy_are_named_before_anything_is_allocated(tmp_path: Path, case: str) -> None:
    quantization, texts = CASES[case]
    model = model_on_meta()
    with pytest.raises(UnsupportedFormatError) as caught:
        sw.materialize(model, saved(tmp_path, {"quantization_config": quantization}))
    message = str(caught.value)
    assert f"{tmp_path / 'config.json'}: expected an unquantised checkpoint, got" in message
    for text in texts:
        assert text in message
    assert model.weight.is_meta


def test_an_index_that_is_named_is_of_its_directory(tmp_path: Path) -> None:
    directory = saved(tmp_path, {"quantization_config": {"quant_method": "mxfp4"}})
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "model.safetensors"}}))
    with pytest.raises(UnsupportedFormatError, match="mxfp4"):
        sw.materialize(model_on_meta(), index)


def test_a_part_of_a_model_may_be_what_is_quantised(tmp_path: Path) -> None:
    config = {"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}}
    with pytest.raises(UnsupportedFormatError, match="compressed-tensors"):
        sw.materialize(model_on_meta(), saved(tmp_path, config))


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}], ids=str)
def test_an_unquantised_checkpoint_loads(tmp_path: Path, config: dict[str, Any]) -> None:
    model = model_on_meta()
    sw.materialize(model, saved(tmp_path, config))
    assert model.weight.eq(1).all()


def test_codes_of_one_byte_keep_their_dtype(tmp_path: Path) -> None:
    """With `dtype=` they became numbers, which a module that is given no codes uses without their scales."""
    codes = torch.tensor([[1.0, -2.0]]).to(torch.float8_e4m3fn)
    save_file({"weight": codes, "bias": torch.ones(1)}, tmp_path / "model.safetensors")
    for dtype in (torch.bfloat16, "auto", None):
        with torch.device("meta"):
            model = nn.Linear(2, 1)
            model.weight = nn.Parameter(torch.empty(1, 2, dtype=codes.dtype), requires_grad=False)
        sw.materialize(model, tmp_path, dtype=dtype)
        assert model.weight.dtype == codes.dtype
        assert torch.equal(model.weight.view(torch.uint8), codes.view(torch.uint8))
        assert model.bias.dtype == (torch.bfloat16 if dtype is torch.bfloat16 else torch.float32)
