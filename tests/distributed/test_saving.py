"""What torch and Accelerate gather of a wrapped model is saved by transformers, and loads with the trained values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from shardwise.testing import RankPool
from tests.distributed.models import check_equal, from_checkpoint
from tests.distributed.steps import (
    Checkpoint,
    backward,
    by_strategy,
    language_loss,
    load,
    make_strategy,
    own_rows,
    token_batch,
)

pytestmark = pytest.mark.distributed


@by_strategy
@pytest.mark.parametrize("kind", ["qwen3_tied", "qwen3_moe"])
def test_a_saved_directory_loads_with_the_trained_values(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, strategy: str, kind: str
) -> None:
    pool.run(train_and_save, strategy, checkpoint(kind), str(tmp_path / "saved"), ranks=2)


def train_and_save(name: str, source: str, directory: str) -> None:
    strategy = make_strategy(name, mixed_precision="bf16")
    model = load(strategy, source, defer=True, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = strategy.wrap_model(model, optimizer)
    backward(strategy, language_loss(model, own_rows(token_batch())))
    optimizer.step()
    optimizer.zero_grad()

    state: dict[str, Any]
    if name == "accelerate":
        state = strategy.accelerator.get_state_dict(model)
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        strategy.unwrap_model(model).save_pretrained(directory, state_dict=state)
    dist.barrier()

    saved = from_checkpoint(directory)
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
    check_equal(model, saved)
    started = from_checkpoint(source, dtype=torch.float32)
    changed = [not torch.equal(a, b) for a, b in zip(saved.parameters(), started.parameters(), strict=True)]
    assert all(changed)
    (architecture,) = json.loads((Path(directory) / "config.json").read_text())["architectures"]
    assert architecture == type(started).__name__
