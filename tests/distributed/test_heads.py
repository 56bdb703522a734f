"""Checkpoints of another class than the model: a new head, a base model alone, a base model's checkpoint under a head."""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.facade import quiet_peft
from tests.distributed.models import check_equal, from_checkpoint, gathered, raw_bytes
from tests.distributed.steps import (
    Checkpoint,
    backward,
    check_gradients,
    every_rank,
    make_strategy,
    own_rows,
    token_batch,
)

pytestmark = pytest.mark.distributed

CLASSIFIER: dict[str, Any] = {"num_labels": 3, "pad_token_id": 0}


# --- a new head ---


@pytest.mark.parametrize("defer", [True, False], ids=["deferred", "source"])
def test_a_head_that_the_checkpoint_lacks_is_an_error_that_lists_it(
    pool: RankPool, checkpoint: Checkpoint, defer: bool
) -> None:
    errors = pool.run_to_errors(classify, checkpoint("qwen3_tied"), "error", defer, ranks=2)
    assert any(isinstance(error, sw.CheckpointError) for error in errors)
    for error in errors:
        assert isinstance(error, (sw.CheckpointError, sw.PeerError)), error
        assert "got none for score.weight. If" in str(error)
        assert "missing='init'" in str(error)


def test_a_new_head_trains_as_in_one_process_on_any_number_of_ranks(
    pool: RankPool, checkpoint: Checkpoint
) -> None:
    heads = {
        digest
        for ranks in (1, 2, 3)
        for digest in pool.run(classify, checkpoint("qwen3_tied"), "init", True, ranks=ranks)
    }
    assert len(heads) == 1


def classify(directory: str, missing: str, defer: bool) -> str:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(9 if dist.get_rank() == 0 else 70 + dist.get_rank())
    strategy = make_strategy("native_fsdp")
    options = {**CLASSIFIER, "dtype": torch.float32}
    model = strategy.load_pretrained(
        AutoModelForSequenceClassification, directory, missing=missing, defer=defer, **options
    )
    model, optimizer = strategy.wrap_model(model, torch.optim.SGD(model.parameters(), lr=0.3))
    head = gathered(model)["score.weight"]
    expected = AutoModelForSequenceClassification.from_pretrained(directory, **options)
    with torch.no_grad():
        expected.score.weight.copy_(head)
    check_equal(model, expected)
    reference = torch.optim.SGD(expected.parameters(), lr=0.3)
    ids = token_batch()
    labels = torch.arange(len(ids)) % 3
    wanted = expected(input_ids=ids, labels=labels, use_cache=False).loss
    wanted.backward()
    loss = model(input_ids=own_rows(ids), labels=own_rows(labels), use_cache=False).loss
    backward(strategy, loss)
    check_gradients(model, expected)
    optimizer.step()
    reference.step()
    assert not torch.equal(gathered(model)["score.weight"], head)
    with torch.no_grad():
        after = model(input_ids=own_rows(ids), labels=own_rows(labels)).loss
        assert sum(every_rank(after.item())) / dist.get_world_size() == pytest.approx(
            expected(input_ids=ids, labels=labels).loss.item(), rel=1e-4
        )
    return hashlib.sha256(raw_bytes(head).numpy()).hexdigest()


def test_a_trainable_copy_of_a_new_head_starts_as_the_head(pool: RankPool, checkpoint: Checkpoint) -> None:
    pytest.importorskip("peft")
    pool.run(copy_head, checkpoint("qwen3_untied"), ranks=2)


def copy_head(directory: str) -> None:
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification

    strategy = make_strategy("native_fsdp")
    model = strategy.load_pretrained(
        AutoModelForSequenceClassification, directory, missing="init", **CLASSIFIER
    )
    with quiet_peft():
        model = strategy.add_adapter(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    tensors = gathered(strategy.wrap_model(model))
    head = tensors["base_model.model.score.original_module.weight"]
    assert head.float().std() > 0
    assert torch.equal(tensors["base_model.model.score.modules_to_save.default.weight"], head)


# --- with and without the head around the base ---


@pytest.mark.parametrize("kind", ["qwen3_untied", "qwen3_moe", "gpt2"])
def test_a_base_model_from_the_checkpoint_of_a_whole_one(
    pool: RankPool, checkpoint: Checkpoint, kind: str
) -> None:
    pool.run(load_as, "AutoModel", checkpoint(kind), "error", ranks=2)


@pytest.mark.parametrize("kind", ["qwen3_tied", "gpt2"])
def test_a_whole_model_from_the_checkpoint_of_its_base(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, kind: str
) -> None:
    from_checkpoint(checkpoint(kind)).base_model.save_pretrained(tmp_path)  # type: ignore[operator, union-attr]
    assert not any(name.startswith("lm_head") for name in load_file(tmp_path / "model.safetensors"))
    pool.run(load_as, "AutoModelForCausalLM", str(tmp_path), "error", ranks=2)


def load_as(auto: str, directory: str, missing: str) -> None:
    import transformers

    cls = getattr(transformers, auto)
    strategy = make_strategy("native_fsdp")
    model = strategy.wrap_model(strategy.load_pretrained(cls, directory, missing=missing))
    check_equal(model, cls.from_pretrained(directory, dtype="auto"))
    assert set(strategy.last_report.origins.values()) <= {"checkpoint", "tied", "recomputed", "kept"}


def test_an_untied_head_that_a_base_does_not_bring(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from_checkpoint(checkpoint("qwen3_untied")).base_model.save_pretrained(tmp_path)  # type: ignore[operator, union-attr]
    for error in pool.run_to_errors(load_as, "AutoModelForCausalLM", str(tmp_path), "error", ranks=2):
        assert isinstance(error, sw.CheckpointError), error
        assert "got none for lm_head.weight. If" in str(error)
    heads = {head for ranks in (1, 3) for head in pool.run(start_head, str(tmp_path), ranks=ranks)}
    assert len(heads) == 1


def start_head(directory: str) -> float:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1 if dist.get_rank() == 0 else 30 + dist.get_rank())
    strategy = make_strategy("native_fsdp")
    model = strategy.wrap_model(
        strategy.load_pretrained(AutoModelForCausalLM, directory, missing=["lm_head.*"])
    )
    head = gathered(model)["lm_head.weight"].double()
    assert head.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert strategy.last_report.origins["lm_head.weight"] == "initialised"
    return float(head.sum())


# --- names that a class declares not to need ---


def test_names_that_the_class_ignores(pool: RankPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("qwen3_untied"), tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file({**tensors, "old.table": torch.ones(3)}, file, metadata={"format": "pt"})
    warnings = pool.run(load_ignoring, str(tmp_path / "copy"), ranks=2)
    assert warnings[0] == (False, True)  # the job's first rank says it once
    assert warnings[1] == (False, False)


def load_ignoring(directory: str) -> tuple[bool, bool]:
    """Return whether shardwise warned of the unexpected name: under a class that declares it, and under one that does not."""
    from transformers import Qwen3ForCausalLM

    class Declares(Qwen3ForCausalLM):
        _keys_to_ignore_on_load_missing = (r"lm_head",)
        _keys_to_ignore_on_load_unexpected = (r"^old\.",)

    class Needs(Qwen3ForCausalLM):
        _keys_to_ignore_on_load_missing = (r"lm_head",)

    found = []
    for cls in (Declares, Needs):
        records: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, records=records: records.append(record.getMessage())  # type: ignore[method-assign, misc]
        logging.getLogger("shardwise").addHandler(handler)
        try:
            strategy = make_strategy("native_fsdp")
            model = strategy.wrap_model(strategy.load_pretrained(cls, directory))
        finally:
            logging.getLogger("shardwise").removeHandler(handler)
        assert strategy.last_report.origins["lm_head.weight"] == "initialised"
        assert gathered(model)["lm_head.weight"].float().std() > 0
        found.append(any("old.table" in text for text in records))
    return found[0], found[1]


# --- dtypes ---


def test_a_dtype_for_each_part_is_refused_by_name(pool: RankPool, checkpoint: Checkpoint) -> None:
    """transformers 5 takes the first one for all parts and says that it is deprecated."""
    for error in pool.run_to_errors(load_mixed, checkpoint("qwen3_tied"), ranks=2):
        assert isinstance(error, sw.ConfigurationError), error
        assert (
            "dtype: expected one dtype, or 'auto', of a model whose values are read at the wrap, got {"
            in str(error)
        )
        assert "load_pretrained(defer=False)" in str(error)


def load_mixed(directory: str) -> None:
    from transformers import AutoModelForCausalLM

    strategy = make_strategy("native_fsdp")
    strategy.load_pretrained(
        AutoModelForCausalLM, directory, dtype={"": torch.float32, "text_config": torch.bfloat16}
    )
