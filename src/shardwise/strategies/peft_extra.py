"""PEFT is an extra: only who adds adapters needs it."""

from __future__ import annotations

import importlib.util

from shardwise.errors import MissingDependencyError


def require_peft(call: str) -> None:
    """Raise unless PEFT is installed.

    Args:
        call: That needs it, for the message.

    Raises:
        MissingDependencyError: Naming the extra.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError(f"{call} needs peft. Install it with: pip install 'shardwise[peft]'")
