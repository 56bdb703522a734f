"""Load a pretrained transformers model with values on the source rank and meta tensors elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from shardwise.errors import CheckpointError, ConfigurationError
from shardwise.materialize import Agreement, entries_of
from shardwise.strategies.load_context import fsdp_pretrained_load_context, without_fsdp_flags
from shardwise.strategies.transformers_compat import (
    from_pretrained,
    from_pretrained_on_meta,
    plain_loads_on_meta,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """What is on record of a model that a strategy loaded.

    Args:
        name: Directory or hub id.
        initialised: Names of parameters that the checkpoint lacked.
    """

    name: str
    initialised: frozenset[str]


def load_on_source(
    model_cls: Any,
    name: str,
    *,
    dtype: Any,
    missing: str | Sequence[str],
    config_kwargs: dict[str, Any],
    source_rank: int | None,
    agreement: Agreement,
) -> tuple[nn.Module, Pretrained]:
    """Load on the source rank and build on meta elsewhere, or load on every rank.

    Args:
        model_cls: A transformers model or auto class.
        name: Directory or hub id.
        dtype: Of the stored parameters, `"auto"` for the checkpoint's own.
        missing: `"error"`, `"init"`, or name patterns of parameters that may be missing.
        config_kwargs: Further arguments of `from_pretrained`.
        source_rank: The only rank to load; None loads on every rank.
        agreement: Of the call.

    Returns:
        The model, and what is on record of it.

    Raises:
        ConfigurationError: An argument that cannot be combined with the strategy.
        CheckpointError: Parameters are missing.
        PeerError: Another rank failed.
    """
    loads = source_rank is None or agreement.rank == source_rank
    with agreement.phase("load"):
        if "device_map" in config_kwargs:
            raise ConfigurationError(
                f"load_pretrained: device_map={config_kwargs['device_map']!r} places the model itself; the strategy "
                "does that. Leave device_map out."
            )
        if loads:
            model, absent = from_pretrained(model_cls, name, dtype=dtype, **config_kwargs)
            _check_missing(name, absent, missing)
        else:
            model, absent = from_pretrained_on_meta(model_cls, name, dtype=dtype, **config_kwargs), []
        if source_rank is not None:
            found = json.dumps({"missing": absent, "tied": _tied(model)}) if loads else None
            source = json.loads(agreement.publish("what the source found", found))
            absent = source["missing"]
            if not loads:
                _tie_as_source(model, source["tied"])
    return model, Pretrained(name=str(name), initialised=frozenset(absent))


def _tied(model: nn.Module) -> list[list[str]]:
    return [
        [slot.fqn for slot in entry.slots]
        for entry in entries_of(model)
        if entry.role == "parameter" and len(entry.slots) > 1
    ]


def _tie_as_source(model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    # Where a checkpoint holds both names of a tied weight, transformers compares their values; on meta it cannot.
    for fqns in groups:
        named = {slot.fqn: e for e in entries_of(model) if e.role == "parameter" for slot in e.slots}
        for fqn in fqns[1:]:
            if fqn in named and fqns[0] in named:
                named[fqn].replace(named[fqns[0]].tensor)


def _check_missing(name: str, absent: list[str], missing: str | Sequence[str]) -> None:
    if missing == "init":
        return
    patterns = [] if missing == "error" else [missing] if isinstance(missing, str) else list(missing)
    refused = [fqn for fqn in absent if not any(fnmatchcase(fqn, pattern) for pattern in patterns)]
    if refused:
        raise CheckpointError(
            f"{name}: expected a value for every parameter, got none for {', '.join(refused[:20])} "
            f"({len(refused)} in all). If these are new, for example a head, pass missing='init' or a list of name "
            "patterns; if not, the checkpoint is incomplete or belongs to another class."
        )


@contextmanager
def plain_load_context(*, source_rank: int, rank: int) -> Iterator[None]:
    """Make a plain `from_pretrained` in the body load on the source rank alone.

    Accelerate's flags are set too, for code that looks at them; except on a source whose `LOCAL_RANK` is not 0,
    where transformers 4.57 would take them as an order to stay empty.

    Args:
        source_rank: Global rank that loads.
        rank: This rank.

    Yields:
        Nothing.
    """
    is_source = rank == source_rank
    with ExitStack() as stack:
        with_flags = not is_source or os.environ.get("LOCAL_RANK") == "0"
        stack.enter_context(fsdp_pretrained_load_context(True) if with_flags else without_fsdp_flags())
        stack.enter_context(plain_loads_on_meta(not is_source))
        yield
