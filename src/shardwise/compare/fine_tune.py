"""A short fine-tuning on shards, beside the same in one process: equal losses, and an export that answers alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from shardwise.compare.announce import Progress, announce
from shardwise.compare.environment import usable_cpus
from shardwise.compare.heap import keep_freed_memory
from shardwise.compare.launch import run_ranks
from shardwise.compare.worker import join_group
from shardwise.training import TrainSettings, sample_text

STEPS: Final = 30
MOST_DIFFERENCE: Final = 0.01
"""Between the two losses of a step, relative; both are computed in float32, in another order."""
PROMPT: Final = "The carpenter wrote a sentence on the board:"

_ANSWER_TOKENS: Final = 16
_SETTINGS: Final = TrainSettings(
    model="",
    data="",
    output_directory="",
    strategy="native_fsdp",
    dtype="float32",
    mixed_precision="no",
    steps=STEPS,
    epochs=1,
    batch_size=4,
    gradient_accumulation=1,
    block_size=16,
    learning_rate=1e-4,
    weight_decay=0.01,
    warmup_steps=3,
    max_grad_norm=1.0,
    activation_checkpointing=False,
    reshard_after_forward=False,  # the model is small, and a gather through the host slow
    lora=None,
    loss_on="all",
    seed=0,
    eval_fraction=0.0,
    eval_every=None,
    checkpoint_every=None,
    keep=None,
    async_checkpoints=False,
    resume=None,
    overwrite=False,
    export=True,
    export_dtype=None,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuning:
    """What came of it.

    Args:
        ranks: Of the training on shards.
        losses: Of each step on shards.
        plain_losses: Of each step in one process, with torch and transformers alone.
        answer: What the sharded model says to `PROMPT`, greedily, in text.
        answers_alike: Whether a plain `from_pretrained` of the export says the same tokens in one process.
        export: Where it was written.
        seconds: Of the training on shards, export included.
        plain_seconds: Of the training in one process.
    """

    ranks: int
    losses: list[float]
    plain_losses: list[float]
    answer: str
    answers_alike: bool
    export: str
    seconds: float
    plain_seconds: float

    @property
    def largest_difference(self) -> float:
        """The largest relative difference between the two losses of a step."""
        pairs = zip(self.losses, self.plain_losses, strict=True)
        return max(abs(one - other) / abs(other) for one, other in pairs)

    @property
    def is_good(self) -> bool:
        """Whether losses agree, and fall, and the export answers as the sharded model does."""
        third = max(1, len(self.losses) // 3)  # a step's rows are few, and some are harder than others
        fell = sum(self.losses[-third:]) < sum(self.losses[:third])
        return fell and self.largest_difference < MOST_DIFFERENCE and self.answers_alike

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {**dataclasses.asdict(self), "largest_difference": self.largest_difference}


def fine_tune(model: Path, directory: Path, *, ranks: int, progress: Progress) -> FineTuning:
    """Fine-tune a model on the text that comes with the package, on shards and in one process, and compare.

    Args:
        model: Directory of a causal language model with a tokenizer.
        directory: For what is written; not there, or empty.
        ranks: Of the training on shards; divides the rows of a step, 4.
        progress: Told what goes on.

    Raises:
        CommandError: A rank failed.
    """
    settings = dataclasses.replace(
        _SETTINGS, model=str(model), data=str(sample_text()), output_directory=str(directory)
    )
    logs = directory / "logs"
    arguments = {"settings": settings.to_json()}
    sharded = run_ranks(
        train_and_answer, arguments, ranks=ranks, log_directory=logs / "sharded", progress=progress
    )[0]
    arguments |= {"rows": sharded["rows"], "export": sharded["export"]}
    plain = run_ranks(train_plainly, arguments, ranks=1, log_directory=logs / "plain", progress=progress)[0]
    return FineTuning(
        ranks=ranks,
        losses=sharded["losses"],
        plain_losses=plain["losses"],
        answer=plain["answer"],
        answers_alike=plain["tokens"] == sharded["tokens"],
        export=sharded["export"],
        seconds=sharded["seconds"],
        plain_seconds=plain["seconds"],
    )


def why_not(model: Path, *, ranks: int) -> str | None:
    """Return why a model cannot be fine-tuned here; None where it can."""
    if _SETTINGS.batch_size % ranks:
        return f"a step has {_SETTINGS.batch_size} rows, which {ranks} ranks cannot share equally"
    if not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return f"{model} has no tokenizer"
    return None


def train_and_answer(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What one rank does: train, export, and say what the model, sharded as it is, answers.

    Args:
        arguments: `settings`.
    """
    announce("fine-tuning on shards: starting ranks")
    keep_freed_memory()
    from shardwise.training import train

    join_group()
    losses: list[float] = []

    def report(event: Mapping[str, Any]) -> None:
        if event["kind"] == "step":
            losses.append(event["loss"])
            announce(
                f"fine-tuning on shards: step {event['step']} of {event['of']}, loss {event['loss']:.4f}"
            )

    settings = TrainSettings.from_json(arguments["settings"])
    outcome = train(settings, report=report, at_end=lambda model: _answer(model.model, settings.model))
    dist.destroy_process_group()
    return {
        "losses": losses,
        "tokens": outcome["at_end"],
        "rows": outcome["rows"],
        "export": outcome["export"],
        "seconds": outcome["seconds"],
    }


def train_plainly(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What one process does: train as a user without shardwise would; then let the export answer.

    Args:
        arguments: `settings`, `rows` (the tokenised data) and `export`.
    """
    import time

    from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

    from shardwise.training.build import has_fused_kernels
    from shardwise.training.order import DataOrder
    from shardwise.training.tokens import TokenRows

    keep_freed_memory()
    torch.set_num_threads(usable_cpus())
    settings = TrainSettings.from_json(arguments["settings"])
    started = time.perf_counter()
    announce("fine-tuning in one process")
    model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    model.train()
    data = TokenRows(Path(arguments["rows"]))
    order = DataOrder(rows=data.summary.rows, batch_size=settings.batch_size, seed=settings.seed)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=has_fused_kernels("cpu") or None)
    scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=STEPS
    )
    losses = []
    for step, rows in zip(range(1, STEPS + 1), order.from_step(0), strict=False):
        tokens, labels = data.batch(rows)
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        announce(f"fine-tuning in one process: step {step} of {STEPS}, loss {losses[-1]:.4f}")
    seconds = time.perf_counter() - started
    del model, optimizer
    announce("asking the export")
    export = arguments["export"]
    tokens_said = _answer(AutoModelForCausalLM.from_pretrained(export), export)
    answer = AutoTokenizer.from_pretrained(export).decode(tokens_said)
    return {"losses": losses, "tokens": tokens_said, "answer": answer, "seconds": seconds}


def _answer(model: Any, tokenizer_directory: str) -> list[int]:
    """Return the tokens that a model says to `PROMPT`, greedily; of a sharded one, every rank calls this."""
    from transformers import AutoTokenizer

    model.eval()
    asked = AutoTokenizer.from_pretrained(tokenizer_directory)(PROMPT, return_tensors="pt")["input_ids"]
    asked = asked.to(next(model.parameters()).device)
    said = model.generate(
        input_ids=asked,
        attention_mask=torch.ones_like(asked),
        do_sample=False,
        max_new_tokens=_ANSWER_TOKENS,
    )
    tokens: list[int] = said[0, asked.shape[1] :].tolist()
    return tokens
