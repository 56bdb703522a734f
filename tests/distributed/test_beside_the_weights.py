"""What lies beside a model's weights: its config, which may be given by name, and how it generates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.models import check_equal, from_checkpoint
from tests.distributed.steps import Checkpoint, load, make_strategy, token_batch

pytestmark = pytest.mark.distributed


def test_a_config_may_be_the_directory_of_one(pool: RankPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = checkpoint("qwen3_untied")
    config = json.loads((Path(directory) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 48}))
    pool.run(load_with_config, directory, str(tmp_path), ranks=2)


def load_with_config(directory: str, config: str) -> None:
    from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

    strategy = make_strategy("native_fsdp")
    for model_cls in (AutoModelForCausalLM, Qwen3ForCausalLM):
        model: Any = strategy.load_pretrained(model_cls, directory, config=config, attention_dropout=0.25)
        assert (model.config.max_position_embeddings, model.config.attention_dropout) == (48, 0.25)
        check_equal(strategy.wrap_model(model), from_checkpoint(directory))
        new: Any = strategy.from_config(model_cls, config, attention_dropout=0.25)
        assert (new.config.max_position_embeddings, new.config.attention_dropout) == (48, 0.25)
    made = sw.TransformersModel(directory, config=Path(config), strategy="native_fsdp", mixed_precision="no")
    assert made.model.get_submodule("model").config.max_position_embeddings == 48  # type: ignore[union-attr]


def test_weights_without_a_config_are_refused_by_name_unless_one_is_given(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    directory = checkpoint("qwen3_untied")
    for file in Path(directory).glob("*.safetensors"):
        shutil.copy(file, tmp_path)
    for error in pool.run_to_errors(load_with, str(tmp_path), {}, ranks=2):
        assert "expected config.json beside the weights, got none" in str(error)
    pool.run(load_with, str(tmp_path), {"config": directory}, ranks=2)


def load_with(directory: str, options: dict[str, Any]) -> None:
    load(make_strategy("native_fsdp"), directory, defer=True, **options)


def test_generation_goes_on_as_after_a_plain_load(pool: RankPool, checkpoint: Checkpoint) -> None:
    pool.run(generate, checkpoint("qwen3_untied"), ranks=2)


def generate(directory: str) -> None:
    strategy = make_strategy("native_fsdp")
    model: Any = strategy.wrap_model(load(strategy, directory, defer=True))
    expected: Any = from_checkpoint(directory)
    ids = token_batch(length=6)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))
