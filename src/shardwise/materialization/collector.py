"""Python's cyclic garbage collector, at rest while many objects are made that all stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_VERY_MANY = 100_000
"""Of new objects: a walk over fewer takes a few milliseconds, and what is garbage among them is found sooner."""

_has_uncounted = False


@contextmanager
def resting_collector() -> Iterator[None]:
    """Keep the collector from running by itself.

    It walks every object of the process whenever a quarter has been added to them: torch's, and some thirty for each
    sharded parameter. Seen with 20,000 parameters, that was half of the time of a load, and a quarter of that of
    importing and building a model of transformers 5. What makes cycles meanwhile keeps them until the next collection, so code that
    holds values in cycles does not belong inside; on meta nothing has values.

    Very many new objects join the oldest generation at the end, as they would after three walks over them that find nothing to free.
    The collector does not count them then; see `find_dropped`.
    """
    global _has_uncounted
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            # What somebody has frozen is left so; to count it takes as long as to walk it, and is asked last.
            if gc.get_count()[0] > _VERY_MANY and gc.get_freeze_count() == 0:
                gc.freeze()
                gc.unfreeze()
                _has_uncounted = True
            gc.enable()


def find_dropped() -> None:
    """Free a model of very many objects that was dropped since it was loaded; called before the next one is loaded.

    FSDP2's cycles keep the shards of a dropped model until a full collection, which the collector makes when it has counted enough.
    """
    global _has_uncounted
    if _has_uncounted:
        _has_uncounted = False
        gc.collect()
