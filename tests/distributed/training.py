"""What the tests of training do alike: a tiny model with a tokenizer, a text, settings, a run on ranks of the pool."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardwise.compare.generated import generate_checkpoint
from shardwise.training import TrainSettings, train

BLOCK = 16
SAVING = "writing the checkpoint of step "
MARKING = (  # a chat template that marks what the assistant says
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}|{% endgeneration %}"
    "{% else %}{{ m.content }}|{% endif %}{% endfor %}"
)
WORDS = (
    "a shard is a part of a tensor",
    "each rank holds its own",
    "nobody needs the whole",
    "a step is taken",
)


def write_model(directory: Path) -> Path:
    """Write a tiny float32 model with a tokenizer whose tokens are bytes."""
    generate_checkpoint(
        directory, config_kind="dense", parameters=100_000, dtype=torch.float32, seed=3, files=1
    )
    byte_tokenizer().save_pretrained(directory)
    return directory


def byte_tokenizer(*, template: str | None = None) -> Any:
    """Return a tokenizer of one token a byte, with an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={each: i for i, each in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    made.chat_template = template
    return made


def write_text(path: Path, *, lines: int = 60) -> Path:
    """Write a text that a tiny model learns something of in a few steps."""
    path.write_text("".join(f"{number}: {WORDS[number % len(WORDS)]}.\n" for number in range(lines)))
    return path


def settings(model: Path, data: Path, output: Path, **changed: Any) -> TrainSettings:
    """Return settings of a short training in full precision."""
    given: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "output_directory": str(output),
        "strategy": "native_fsdp",
        "dtype": "float32",
        "mixed_precision": "no",
        "steps": 6,
        "epochs": 1,
        "batch_size": 8,
        "gradient_accumulation": 1,
        "block_size": BLOCK,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "activation_checkpointing": False,
        "reshard_after_forward": True,
        "lora": None,
        "loss_on": "auto",
        "seed": 5,
        "eval_fraction": 0.0,
        "eval_every": None,
        "checkpoint_every": None,
        "keep": None,
        "async_checkpoints": False,
        "resume": None,
        "overwrite": False,
        "export": False,
        "export_dtype": None,
    }
    return TrainSettings(**{**given, **changed})


def train_here(given: Mapping[str, Any], signals: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Train on this rank of the pool; return the outcome, with what was reported.

    Args:
        given: Settings as JSON has them.
        signals: By "rank step", the name of a signal that the rank sends itself once it has taken the step; by "rank step_save"
            as its checkpoint begins, by "rank step_eval" once it is evaluated.
    """
    events: list[dict[str, Any]] = []

    def report(event: Mapping[str, Any]) -> None:
        events.append(dict(event))
        moment = {"step": str(event.get("step")), "eval": f"{event.get('step')}_eval"}.get(event["kind"])
        if moment is None and event["text"].startswith(SAVING):
            moment = f"{event['text'].removeprefix(SAVING)}_save"
        name = (signals or {}).get(f"{dist.get_rank()} {moment}")
        if name is not None:
            os.kill(os.getpid(), getattr(signal, name))

    outcome = train(TrainSettings.from_json(given), report=report)
    return {
        **outcome,
        "losses": [event["loss"] for event in events if event["kind"] == "step"],
        "notes": [event["text"] for event in events if event["kind"] == "note"],
        "evaluations": [event["loss"] for event in events if event["kind"] == "eval"],
    }


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """Return the lines of a training's metrics."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
