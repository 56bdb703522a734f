"""Names of tensors, free of the prefixes that wrappers add."""

from __future__ import annotations

_WRAPPER_PREFIXES = ("_checkpoint_wrapped_module.", "_orig_mod.")


def clean_fqn(fqn: str) -> str:
    """Return a name without the prefixes of activation checkpointing and `torch.compile`."""
    for prefix in _WRAPPER_PREFIXES:
        fqn = fqn.replace(prefix, "")
    return fqn
