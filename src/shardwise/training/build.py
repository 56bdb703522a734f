"""From settings to a model with what trains it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from shardwise.errors import DataError
from shardwise.strategies import require_peft
from shardwise.training.settings import LoraSettings, TrainSettings
from shardwise.transformers_model import TransformersModel

_ADAPTER_NAME = "default"  # PEFT's own, under which a saved adapter needs no folder of its name


def make_model(settings: TrainSettings) -> TransformersModel:
    """Make the model, and its adapter if one is trained; nothing is sharded or read yet. All ranks call this together."""
    model = TransformersModel(
        settings.model,
        strategy=settings.strategy,
        mixed_precision=settings.mixed_precision,
        dtype=settings.dtype,
        fsdp_config={
            "activation_checkpointing": settings.activation_checkpointing,
            "reshard_after_forward": None if settings.reshard_after_forward else False,
        },
        gradient_accumulation_steps=settings.gradient_accumulation,
    )
    # Each rank drops out other activations; what all start from follows the first rank's seed.
    torch.manual_seed(settings.seed + dist.get_rank())
    if settings.lora is not None:
        model.add_adapter_to_model(_ADAPTER_NAME, _peft_config(settings.lora))
    return model


def add_optimizer(model: TransformersModel, settings: TrainSettings, *, steps: int) -> None:
    """Give a model AdamW, and a learning rate that rises for `warmup_steps` and falls by a cosine until `steps`."""
    # With a gradient scaler the kernel would be handed the scale, which is not a shard.
    fused = settings.mixed_precision != "fp16" and has_fused_kernels(model.strategy.device_mesh.device_type)
    model.set_optimizer(
        "AdamW",
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=fused or None,
    )
    model.set_lr_scheduler("cosine", num_warmup_steps=settings.warmup_steps, num_training_steps=steps)


def has_fused_kernels(device_type: str) -> bool:
    """Return whether torch has optimizers of one kernel for a kind of device: they read and write each element once.

    Source: torch.utils._foreach_utils, by which `torch.optim` itself checks `fused=True`.
    """
    return device_type in _get_fused_kernels_supported_devices()


def tokenizer_of(model: TransformersModel, name: str) -> Any:
    """Return the tokenizer beside a model.

    Raises:
        DataError: There is none.
    """
    if model.tokenizer is None:
        raise DataError(
            f"{name}: expected a tokenizer beside the model, got none. Put tokenizer.json and tokenizer_config.json there."
        )
    return model.tokenizer


def refuse_unknown_tokens(model: TransformersModel, *, largest: int) -> None:
    """Raise if data has tokens that the model does not know.

    Raises:
        DataError: Naming the highest.
    """
    config: Any = model.model.config
    known = config.get_text_config().vocab_size
    if largest >= known:
        raise DataError(
            f"expected tokens below {known}, the model's vocab_size, got {largest}: the tokenizer beside the model is another "
            "model's, or the embedding was not resized for it."
        )


def _peft_config(lora: LoraSettings) -> Any:
    require_peft("an adapter")
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or None,
    )
