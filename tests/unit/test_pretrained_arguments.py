"""What `load_pretrained` is called with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from shardwise.errors import ConfigurationError
from shardwise.strategies.pretrained_arguments import check_pretrained_arguments
from shardwise.tensors import floating_dtype


@pytest.mark.parametrize(
    ("model_cls", "name"),
    [(AutoModelForCausalLM, "org/m"), (GPT2LMHeadModel, Path("m")), (GPT2LMHeadModel, "./m")],
)
def test_a_class_and_a_name_pass(model_cls: Any, name: Any) -> None:
    check_pretrained_arguments(model_cls, name, {"revision": "main"})


@pytest.mark.parametrize(
    ("model_cls", "name", "texts"),
    [
        ("org/m", AutoModelForCausalLM, ["the other way round", "(AutoModelForCausalLM, 'org/m')"]),
        (Path("m"), GPT2LMHeadModel, ["the other way round", "(GPT2LMHeadModel, 'm')"]),
        ("AutoModelForCausalLM", "org/m", ["the text 'AutoModelForCausalLM'. Import the class"]),
        (AutoTokenizer, "org/m", ["gives a model, got AutoTokenizer. Tokenizers, "]),
        (AutoConfig, "org/m", ["gives a model, got AutoConfig. "]),
        (GPT2Config, "org/m", ["gives a model, got GPT2Config. "]),
        (nn.Linear, "org/m", ["gives a model, got Linear. ", "shardwise.materialize"]),
        (nn.Linear(1, 1), "org/m", ["got a model of class Linear. Pass a class"]),
        (object(), "org/m", ["got an object of class object. Pass a class"]),
        (AutoModelForCausalLM, None, ["a directory or hub id second, got None"]),
        (AutoModelForCausalLM, "", ["a directory or hub id second, got ''"]),
        (AutoModelForCausalLM, GPT2Config(), ["a directory or hub id second, got GPT2Config"]),
    ],
)
def test_anything_else_is_refused(model_cls: Any, name: Any, texts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_pretrained_arguments(model_cls, name, {})
    assert str(caught.value).startswith("load_pretrained: expected a ")
    for text in texts:
        assert text in str(caught.value)


def test_the_old_name_of_dtype_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^load_pretrained: torch_dtype=auto is called dtype= here\.$"
    ):
        check_pretrained_arguments(AutoModelForCausalLM, "m", {"torch_dtype": "auto"})


# --- dtypes by name ---


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        ("fp32", torch.float32),
        ("float32", torch.float32),
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("auto", "auto"),
    ],
)
def test_a_dtype_has_both_its_names(given: Any, dtype: Any) -> None:
    assert floating_dtype(given, others=("auto",)) == dtype


def test_none_is_itself_where_it_may_be_given() -> None:
    assert floating_dtype(None, others=(None, "auto")) is None


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("bfloat", " Did you mean 'bfloat16'?"),
        ("BF16", " Did you mean 'bf16'?"),
        ("float23", " Did you mean 'float32'?"),
        ("manual_seed", ""),
        (torch.int8, ""),
        (None, ""),
        (3, ""),
    ],
)
def test_what_is_no_floating_point_dtype_is_refused(given: Any, meant: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        floating_dtype(given, others=("auto",))
    assert str(caught.value) == (
        f"dtype: expected 'auto' or a floating point torch dtype or its name, got {given!r}.{meant}"
    )
