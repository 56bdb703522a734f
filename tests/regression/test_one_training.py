"""All that a fine-tuning brings together: a head and tokens that are new, an adapter, checkpointing, compilation, two optimizers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.facade import quiet_peft
from tests.distributed.models import VOCABULARY, gathered, raw_bytes
from tests.distributed.steps import Checkpoint, backward, every_rank, make_strategy

pytestmark = pytest.mark.distributed

TOKENS = VOCABULARY + 5
STEPS = 10


def test_ten_steps_saved_and_loaded_at_another_number_of_ranks_by_the_other_strategy(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    directory, saved = checkpoint("qwen3_untied"), str(tmp_path / "adapter")
    trained = pool.run(train, "native_fsdp", directory, saved, ranks=2)
    loaded = pool.run(load_again, "accelerate", directory, saved, ranks=3)
    (digest,) = {digest for digest, _ in (*trained, *loaded)}
    assert digest
    for _, logits in (*trained, *loaded):
        torch.testing.assert_close(torch.tensor(logits), torch.tensor(trained[0][1]), rtol=1e-4, atol=1e-5)


def base_model(strategy: Any, directory: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3 + dist.get_rank())
    model = strategy.load_pretrained(
        AutoModelForSequenceClassification,
        directory,
        missing=["score.*"],
        num_labels=3,
        pad_token_id=0,
        dtype=torch.float32,
    )
    model.resize_token_embeddings(TOKENS, mean_resizing=False)
    return model


def train(name: str, directory: str, saved: str) -> tuple[str, list[float]]:
    from peft import LoraConfig

    strategy = make_strategy(name, fsdp_config={"activation_checkpointing": True})
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["score", "embed_tokens"],
    )
    with quiet_peft():
        model = strategy.add_adapter(base_model(strategy, directory), config)
    before = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n], lr=1e-2)
    model, before = strategy.wrap_model(model, before)
    copies = [p for n, p in model.named_parameters() if ".modules_to_save." in n]
    assert len(copies) == 2
    after = strategy.wrap_optimizer(torch.optim.AdamW(copies, lr=1e-2))
    compiled = torch.compile(model, backend="eager")
    started = gathered(model)
    losses = []
    for _ in range(STEPS):
        ids, labels = own_batch()
        loss = compiled(input_ids=ids, labels=labels, use_cache=False).loss
        backward(strategy, loss)
        for optimizer in (before, after):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(sum(every_rank(loss.item())))
    assert losses[-1] < losses[0]
    ended = gathered(model)
    trained = {fqn for fqn, parameter in ended.items() if not torch.equal(parameter, started[fqn])}
    wanted = {fqn for fqn in ended if "lora_" in fqn or ".modules_to_save." in fqn}
    assert trained == wanted, sorted(trained ^ wanted)
    sw.export_checkpoint(model, saved)
    return outcome(model)


def load_again(name: str, directory: str, saved: str) -> tuple[str, list[float]]:
    strategy = make_strategy(name)
    with quiet_peft():
        model = strategy.load_adapter(base_model(strategy, directory), saved, is_trainable=False)
    model = strategy.wrap_model(model)
    return outcome(model)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, TOKENS, (6, 10), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = VOCABULARY + 1  # a new token, in every row
    return ids, torch.arange(6) % 3


def own_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids, labels = batch()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return ids.chunk(ranks)[rank], labels.chunk(ranks)[rank]


def outcome(model: Any) -> tuple[str, list[float]]:
    """Return a digest of what was trained and the logits of the whole batch."""
    digest = hashlib.sha256()
    for fqn, tensor in sorted(gathered(model).items()):
        if "lora_" in fqn or ".modules_to_save." in fqn:
            digest.update(fqn.encode() + raw_bytes(tensor).numpy().tobytes())
    with torch.no_grad():
        logits = model.eval()(input_ids=batch()[0]).logits
    return digest.hexdigest(), logits.flatten().tolist()
