"""What a training is asked to do, as data that every rank gets alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from shardwise.errors import ConfigurationError
from shardwise.strategies import check_strategy

DTYPES: Final = ("float32", "bfloat16", "auto")
PRECISIONS: Final = ("no", "bf16", "fp16")
LOSS_ON: Final = ("auto", "all", "assistant")
RESUME_AUTO: Final = "auto"
# What another run of the same training may have otherwise; all else makes it another training.
_OF_THE_RUN: Final = frozenset(
    {
        "model",
        "output_directory",
        "data",
        "strategy",
        "gradient_accumulation",
        "activation_checkpointing",
        "reshard_after_forward",
        "eval_every",
        "checkpoint_every",
        "keep",
        "async_checkpoints",
        "resume",
        "overwrite",
        "export",
        "export_dtype",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """An adapter that is trained in place of the model.

    Args:
        rank: Of its matrices.
        alpha: Its output is scaled by alpha / rank.
        dropout: On its input.
        targets: Names of the modules that get one; empty for what PEFT chooses for the model.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        _at_least("lora_rank", self.rank, 1)
        _positive("lora_alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise ConfigurationError(f"lora_dropout: expected 0 or more and less than 1, got {self.dropout}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """A training.

    Args:
        model: Directory or hub id of a causal language model.
        data: A file of text, or of JSON lines with `text` or `messages` (`.jsonl`, `.json`, `.ndjson`).
        output_directory: Where checkpoints, metrics and the export go; seen by all ranks.
        strategy: `native_fsdp` or `accelerate`.
        dtype: In which shards, which the optimizer updates, are stored: `float32`, `bfloat16`, or `auto` for the checkpoint's.
        mixed_precision: Compute dtype: `no` (that of the shards), `bf16` or `fp16`.
        steps: Optimizer steps in all; None is `epochs` times those that the data has.
        epochs: How often the data is gone through where `steps` is None.
        batch_size: Rows of one optimizer step, over all ranks.
        gradient_accumulation: Backward passes in which each rank does its rows of a step.
        block_size: Tokens of a row.
        learning_rate: Highest one.
        weight_decay: Of AdamW; not of biases, norms and parameters of one dim.
        warmup_steps: In which the learning rate rises from 0; then it falls by a cosine to 0.
        max_grad_norm: To which gradients are clipped; None clips nothing.
        activation_checkpointing: Compute each layer's activations again in backward.
        reshard_after_forward: Free gathered layers after forward and gather them again in backward; False keeps the whole model
            gathered from forward to backward, which moves a third less.
        lora: An adapter to train in place of the model; None trains the model.
        loss_on: Of chat messages: `assistant` tokens, `all`, or `auto`: assistant tokens where the template marks them.
        seed: Of the data's order and of random numbers.
        eval_fraction: Of the rows, taken from the data's end, that are not trained on.
        eval_every: Steps between two evaluations; None is at the end alone.
        checkpoint_every: Steps between two checkpoints; None is at the end alone.
        keep: How many of the newest checkpoints are kept; None keeps all.
        async_checkpoints: Copy shards to host memory and write them while training goes on.
        resume: `auto` for the newest good checkpoint in `output_directory`, if any; a checkpoint's directory; None starts anew.
        overwrite: Whether figures and export of another training in `output_directory` are replaced. One that is gone on from
            replaces its own.
        export: Whether the trained model, or the adapter, is written for `from_pretrained` at the end.
        export_dtype: In which it is written; None is that of the shards.
    """

    model: str
    data: str
    output_directory: str
    strategy: str
    dtype: str
    mixed_precision: str
    steps: int | None
    epochs: int
    batch_size: int
    gradient_accumulation: int
    block_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    max_grad_norm: float | None
    activation_checkpointing: bool
    reshard_after_forward: bool
    lora: LoraSettings | None
    loss_on: str
    seed: int
    eval_fraction: float
    eval_every: int | None
    checkpoint_every: int | None
    keep: int | None
    async_checkpoints: bool
    resume: str | None
    overwrite: bool
    export: bool
    export_dtype: str | None

    def __post_init__(self) -> None:
        check_strategy(self.strategy)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("mixed_precision", self.mixed_precision, PRECISIONS)
        _one_of("loss_on", self.loss_on, LOSS_ON)
        if self.export_dtype is not None:
            _one_of("export_dtype", self.export_dtype, DTYPES[:2])
        for name in ("epochs", "batch_size", "gradient_accumulation"):
            _at_least(name, getattr(self, name), 1)
        for name in ("steps", "eval_every", "checkpoint_every", "keep"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _at_least("block_size", self.block_size, 2)  # the last token of a row predicts nothing
        _at_least("warmup_steps", self.warmup_steps, 0)
        if not 0 <= self.seed < 2**63:
            raise ConfigurationError(f"seed: expected 0 or more and less than 2**63, got {self.seed}")
        if self.eval_every is not None and not self.eval_fraction:
            raise ConfigurationError(
                f"eval_every: expected rows to evaluate with (eval_fraction), got {self.eval_every} and none"
            )
        _positive("learning_rate", self.learning_rate)
        if self.max_grad_norm is not None:
            _positive("max_grad_norm", self.max_grad_norm)
        if not 0 <= self.eval_fraction < 1:
            raise ConfigurationError(
                f"eval_fraction: expected 0 or more and less than 1, got {self.eval_fraction}"
            )

    def rows_of_rank(self, ranks: int) -> int:
        """Return how many rows of a step each rank does.

        Raises:
            ConfigurationError: The step's rows cannot be shared equally.
        """
        if self.batch_size % (ranks * self.gradient_accumulation):
            raise ConfigurationError(
                f"batch_size: expected a multiple of {ranks} ranks x {self.gradient_accumulation} passes (gradient_accumulation) "
                f"= {ranks * self.gradient_accumulation}, got {self.batch_size}: it counts the rows of a step over all ranks"
            )
        return self.batch_size // ranks

    def identity(self) -> dict[str, Any]:
        """Return what two runs of one training have in common, as JSON has it."""
        return {name: value for name, value in self.to_json().items() if name not in _OF_THE_RUN}

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        found = asdict(self)
        if self.lora is not None:
            found["lora"]["targets"] = list(self.lora.targets)
        return found

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> TrainSettings:
        """Return the settings that `to_json` gave."""
        values = {field.name: given[field.name] for field in fields(cls)}
        if values["lora"] is not None:
            values["lora"] = LoraSettings(**{**values["lora"], "targets": tuple(values["lora"]["targets"])})
        return cls(**values)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigurationError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name}: expected {least} or more, got {value!r}")


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigurationError(f"{name}: expected a number above 0, got {value!r}")
