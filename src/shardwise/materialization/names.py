"""Names of tensors, free of the prefixes that wrappers add."""

from __future__ import annotations

from torch import nn

WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")
"""Parts of names that activation checkpointing and `torch.compile` add."""

_PEFT_PREFIX = "base_model.model."
_PEFT_WRAPPERS = ("base_layer", "original_module")
_PEFT_COPIES = "modules_to_save"


def clean_fqn(fqn: str) -> str:
    """Return a name without the parts that activation checkpointing and `torch.compile` add."""
    if not any(wrapper in fqn for wrapper in WRAPPERS):
        return fqn
    return ".".join(part for part in fqn.split(".") if part not in WRAPPERS)


def checkpoint_name_of(fqn: str) -> str:
    """Return the name under which a checkpoint of the base model holds a parameter, given its name in a wrapped model.

    PEFT puts the base model under `base_model.model` and a layer that it adapts under `base_layer`, or under
    `original_module` where trainable copies stand beside it, one per adapter under `modules_to_save`; those start as what they
    are copies of.
    Source: `peft.tuners.tuners_utils.BaseTuner`, `peft.utils.other.ModulesToSaveWrapper`.
    """
    name = clean_fqn(fqn)
    if not name.startswith(_PEFT_PREFIX):
        return name
    parts = name.removeprefix(_PEFT_PREFIX).split(".")
    if _PEFT_COPIES in parts:
        at = parts.index(_PEFT_COPIES)
        parts = [*parts[:at], *parts[at + 2 :]]  # the adapter's name follows
    return ".".join(part for part in parts if part not in _PEFT_WRAPPERS)


def original_of(fqn: str) -> str:
    """Return the name of what a trainable copy of PEFT's is a copy of, given the copy's or that of a module in it; else the name."""
    parts = fqn.split(".")
    if _PEFT_COPIES not in parts:
        return fqn
    at = parts.index(_PEFT_COPIES)
    return ".".join([*parts[:at], "original_module", *parts[at + 2 :]])  # the adapter's name follows


def without_wrappers(model: nn.Module) -> nn.Module:
    """Return the model that `torch.compile` and activation checkpointing wrap."""
    while (
        inside := next((model._modules[name] for name in WRAPPERS if name in model._modules), None)
    ) is not None:
        model = inside
    return model


def model_inside(model: nn.Module) -> nn.Module:
    """Return the model that `torch.compile`, activation checkpointing and PEFT wrap: the one that a checkpoint is of."""
    while True:
        model = without_wrappers(model)
        if not hasattr(model, "peft_config") or "base_model" not in model._modules:
            return model
        inside = model._modules["base_model"]._modules.get("model")  # type: ignore[union-attr]
        if inside is None:
            return model
        model = inside
