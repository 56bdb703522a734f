"""A wrapped model in the trainers of transformers and TRL: they leave it sharded, and train as in one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.models import VOCABULARY, from_checkpoint
from tests.distributed.steps import Checkpoint

pytestmark = pytest.mark.distributed

STEPS, ROWS_OF_STEP = 3, 4


def rows() -> list[dict[str, torch.Tensor]]:
    """Return the whole job's rows, of few tokens, so that something is learned of them in a few steps."""
    size = (STEPS * ROWS_OF_STEP, 12)
    tokens = torch.randint(0, VOCABULARY // 10, size, generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(kind: Any, folder: str, *, ranks: int, **more: Any) -> Any:
    """Return settings of a short training on CPU ranks, in full precision and without shuffling."""
    return kind(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS_OF_STEP // ranks,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=1,
        data_seed=1,
        **more,
    )


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_of_transformers_trains_it(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    directory = checkpoint("qwen3_tied")
    expected = pool.run(train_plainly, directory, str(tmp_path / "plain"), ranks=1)[0]
    assert expected[-1] < expected[0]
    found = pool.run(train_wrapped, directory, str(tmp_path / "wrapped"), ranks=2)
    for losses in found:
        assert losses == pytest.approx(expected, rel=1e-4)


def leave_job() -> None:
    """Be a process that no launcher has started."""
    dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]


def wrapped_model(directory: str) -> Any:
    from transformers import AutoModelForCausalLM

    strategy = sw.AccelerateStrategy(mixed_precision="no", timeout=60.0)
    return strategy.wrap_model(strategy.load_pretrained(AutoModelForCausalLM, directory, dtype=torch.float32))


def train_plainly(directory: str, folder: str) -> list[float]:
    from transformers import Trainer, TrainingArguments

    leave_job()
    model = from_checkpoint(directory, dtype=torch.float32)
    trainer = Trainer(model=model, args=arguments(TrainingArguments, folder, ranks=1), train_dataset=rows())
    trainer.train()
    return losses_of(trainer)


def train_wrapped(directory: str, folder: str) -> list[float]:
    from transformers import Trainer, TrainingArguments

    model = wrapped_model(directory)
    before = {id(parameter) for parameter in model.parameters()}
    given = arguments(
        TrainingArguments,
        folder,
        ranks=dist.get_world_size(),
        accelerator_config={"use_configured_state": True},
    )
    trainer = Trainer(model=model, args=given, train_dataset=rows())
    trainer.train()
    assert trainer.model is model
    assert isinstance(model, FSDPModule)
    assert {id(parameter) for parameter in model.parameters()} == before
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return losses_of(trainer)


def test_a_trainer_is_refused_where_it_would_mix_parameters_up(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    errors = pool.run_to_errors(train_wrapped, checkpoint("qwen3_moe"), str(tmp_path), ranks=4)
    for error in errors:  # the routers of two layers have three rows
        assert isinstance(error, sw.ConfigurationError)
        assert "gate.weight of shape (3, 32) and 1 more: Accelerate would mix them up" in str(error)


def test_the_trainer_of_trl_trains_it(pool: RankPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL with datasets and pyarrow takes 280 MB: pip install trl")
    directory = checkpoint("qwen3_tied")
    expected = pool.run(sft_plainly, directory, str(tmp_path / "plain"), ranks=1)[0]
    assert expected[-1] < expected[0]
    for losses in pool.run(sft_wrapped, directory, str(tmp_path / "wrapped"), ranks=2):
        assert losses == pytest.approx(expected, rel=1e-4)


def sft_trainer(model: Any, folder: str, **more: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.distributed.training import byte_tokenizer

    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    given = arguments(SFTConfig, folder, gradient_checkpointing=False, bf16=False, **more)
    return SFTTrainer(model=model, args=given, train_dataset=data, processing_class=byte_tokenizer())


def sft_plainly(directory: str, folder: str) -> list[float]:
    leave_job()
    trainer = sft_trainer(from_checkpoint(directory, dtype=torch.float32), folder, ranks=1)
    trainer.train()
    return losses_of(trainer)


def sft_wrapped(directory: str, folder: str) -> list[float]:
    model = wrapped_model(directory)
    configured = {"use_configured_state": True}
    trainer = sft_trainer(model, folder, ranks=dist.get_world_size(), accelerator_config=configured)
    trainer.train()
    assert trainer.model is model
    return losses_of(trainer)
