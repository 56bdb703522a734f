"""Load a pretrained transformers model: values on the source rank, or on no rank before the wrap."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from shardwise.checkpoint import HubAccess
from shardwise.conversion import pinned_dtypes
from shardwise.errors import ConfigurationError
from shardwise.materialization import (
    Agreement,
    Binding,
    Entry,
    bind,
    check_bound,
    default_staging_bytes,
    entries_of,
    open_source,
    permitted,
    renewed,
    require_equal_aliases,
    resting_collector,
    warn_of_unexpected,
)
from shardwise.strategies.empty_model import build_empty
from shardwise.strategies.load_context import fsdp_pretrained_load_context, without_fsdp_flags
from shardwise.strategies.transformers_compat import (
    from_pretrained,
    from_pretrained_on_meta,
    plain_loads_on_meta,
)
from shardwise.strategies.value_readers import constructors_without_values


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """What is on record of a model that a strategy loaded.

    Args:
        name: Directory or hub id.
        absent: Names that the checkpoint lacked, of tensors that have values already.
    """

    name: str
    absent: frozenset[str]


def load_deferred(
    model_cls: Any,
    name: str,
    *,
    dtype: Any,
    missing: str | Sequence[str],
    config_kwargs: dict[str, Any],
    direct_io: bool,
    agreement: Agreement,
) -> tuple[nn.Module, tuple[Entry, ...], Pretrained, Binding]:
    """Build a model on meta on every rank and find its values in the checkpoint's headers.

    Args:
        model_cls: A transformers model or auto class.
        name: Directory or hub id.
        dtype: Of the stored parameters, `"auto"` for the checkpoint's own.
        missing: `"error"`, `"init"`, or name patterns of parameters that may be missing.
        config_kwargs: Further arguments of `from_pretrained`.
        direct_io: Whether files are read past the page cache.
        agreement: Of the call.

    Returns:
        The model, its tensors, what is on record of it, and where its values are.

    Raises:
        ConfigurationError: An argument that cannot be combined with the strategy.
        CheckpointError: The checkpoint is damaged, does not fit the model, or lacks parameters.
        PeerError: Another rank failed.
    """
    subfolder = config_kwargs.pop("subfolder", "")
    with TemporaryDirectory(prefix="shardwise-") as configs:  # for a rank that does not see the checkpoint
        opened = open_source(
            name,
            agreement=agreement,
            revision=config_kwargs.get("revision"),
            subfolder=subfolder,
            access=HubAccess.from_arguments(config_kwargs),
            direct_io=direct_io,
            configs_into=Path(configs),
        )
        with agreement.phase("build"), resting_collector():
            refuse_device_map(config_kwargs)
            model, chosen = build_empty(
                model_cls, name, opened.path, opened.source, dtype=dtype, **config_kwargs
            )
            entries = entries_of(model)
            binding = bind(
                model,
                entries,
                opened.source,
                rename=None,
                conversions=None,
                pinned=pinned_dtypes(model, chosen, stored=True),
            )
            permitted(
                binding.absent, missing, name=name, optional=binding.optional, unexpected=binding.unexpected
            )
            check_bound(entries, binding.bound)
            await_values(model, entries, binding, chosen)
            entries = renewed(entries)
            warn_of_unexpected(binding, name, agreement)
    if binding.aliases:
        staging_bytes = default_staging_bytes("cpu")  # the values stay on the host
        require_equal_aliases(binding, opened.source, agreement=agreement, staging_bytes=staging_bytes)
        opened.source.close()  # until the wrap, which opens what it reads
    return model, entries, Pretrained(name=str(name), absent=frozenset()), binding


def await_values(model: nn.Module, entries: Sequence[Entry], binding: Binding, chosen: torch.dtype) -> None:
    """Put on meta whatever the checkpoint has values for, in the dtype in which the model's class keeps it.

    A constructor may make a tensor past every context, as `torch.Tensor(8).uniform_()` does; and on transformers 4.57
    buffers are built with values.
    """
    of_stored = pinned_dtypes(model, chosen, stored=True)
    of_absent = pinned_dtypes(model, chosen, stored=False)
    absent = frozenset(binding.absent)
    for entry in entries:
        awaited = entry.fqn in binding.bound
        if entry.role == "attribute" or not (awaited or entry.fqn in absent):
            continue
        dtype = entry.tensor.dtype
        if entry.tensor.is_floating_point() and (awaited or entry.role == "parameter"):
            of = binding.bound.get(entry.fqn)
            pinned = of_stored(of.name) if of is not None else of_absent(entry.fqn)
            dtype = (of.made_dtype if of is not None else None) or pinned or dtype
        device = torch.device("meta") if awaited else entry.tensor.device
        if entry.tensor.device == device and entry.tensor.dtype == dtype:
            continue
        changed = entry.tensor.detach().to(device=device, dtype=dtype)
        if entry.role == "parameter":
            changed = nn.Parameter(changed, requires_grad=entry.tensor.requires_grad)
        entry.replace(changed)


def refuse_device_map(config_kwargs: Mapping[str, Any]) -> None:
    """Raise if the user places the model, which is the strategy's part."""
    if "device_map" in config_kwargs:
        raise ConfigurationError(
            f"device_map={config_kwargs['device_map']!r} places the model itself; the strategy "
            "does that. Leave device_map out."
        )


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
    with agreement.phase("load"), constructors_without_values(model_cls):
        refuse_device_map(config_kwargs)
        if loads:
            model, absent = from_pretrained(model_cls, name, dtype=dtype, **config_kwargs)
            permitted(absent, missing, name=name)
        else:
            model, absent = from_pretrained_on_meta(model_cls, name, dtype=dtype, **config_kwargs), []
        if source_rank is not None:
            found = json.dumps({"missing": absent, "tied": _tied(model)}) if loads else None
            source = json.loads(agreement.publish("what the source found", found))
            absent = source["missing"]
            if not loads:
                _tie_as_source(model, source["tied"])
    return model, Pretrained(name=str(name), absent=frozenset(absent))


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
