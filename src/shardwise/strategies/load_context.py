"""Contexts in which a plain `from_pretrained` keeps the ranks that are not the source empty."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_FLAGS = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")


@contextmanager
def fsdp_pretrained_load_context(enabled: bool) -> Iterator[None]:
    """Set Accelerate's two environment flags for FSDP loading, and restore what was there.

    On transformers 4.57 the flags make `from_pretrained` keep a rank empty unless `LOCAL_RANK` is 0. On
    transformers 5 they no longer keep a rank from reading every weight: use a strategy's `load_pretrained` or
    `pretrained_load_context`, which do not depend on them.

    Args:
        enabled: False leaves the environment untouched.

    Yields:
        Nothing. Earlier values, set, unset or empty, are restored on exit, also after an exception.

    Source: `transformers.integrations.is_fsdp_enabled` reads the flags.
    """
    if not enabled:
        yield
        return
    before = {flag: os.environ.get(flag) for flag in _FLAGS}
    os.environ.update(dict.fromkeys(_FLAGS, "true"))
    try:
        yield
    finally:
        restore_environment(before)


@contextmanager
def without_fsdp_flags() -> Iterator[None]:
    """Unset Accelerate's two flags, and restore what was there."""
    before = {flag: os.environ.pop(flag, None) for flag in _FLAGS}
    try:
        yield
    finally:
        restore_environment(before)


@contextmanager
def unchanged_environment() -> Iterator[None]:
    """Undo every change that the body makes to `os.environ`."""
    before = dict(os.environ)
    try:
        yield
    finally:
        restore_environment({**dict.fromkeys(os.environ), **before})


def restore_environment(values: dict[str, str | None]) -> None:
    """Set each variable to its value; remove those whose value is None."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
