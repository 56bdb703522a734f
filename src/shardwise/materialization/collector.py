"""Python's cyclic garbage collector, at rest while many objects are made that all stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resting_collector() -> Iterator[None]:
    """Keep the collector from running by itself.

    It walks every object of the process whenever a quarter has been added to them: torch's, and some thirty for each
    sharded parameter. Seen with 20,000 parameters, that was half of the time of a load. Nothing here makes cycles, so
    nothing stays that reference counts would not free; foreign code does not belong inside.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
