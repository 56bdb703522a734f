"""Names of tensors, free of the prefixes that wrappers add."""

from __future__ import annotations

_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")


def clean_fqn(fqn: str) -> str:
    """Return a name without the parts that activation checkpointing and `torch.compile` add."""
    return ".".join(part for part in fqn.split(".") if part not in _WRAPPERS)
