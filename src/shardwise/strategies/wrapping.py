"""Which modules become FSDP2 units, decided before anything is sharded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from shardwise.errors import AlreadyWrappedError, ConfigurationError, UnsupportedParameterError, listed
from shardwise.materialization import Entry, clean_fqn, modules_by_prefix, named_modules_of
from shardwise.strategies.fsdp_config import FSDPConfig
from shardwise.strategies.pinned_modules import pinned_modules
from shardwise.tensors import dtype_name

_log = logging.getLogger("shardwise")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Modules whose parameters FSDP2 gathers together.

    Args:
        fqns: Of the modules, as `get_submodule` takes them; several where a parameter is tied between them.
        keep_gathered: Stay gathered after forward because backward needs them first.
        own_dtype: Compute in the dtype in which they are stored, whatever the rest computes in.
    """

    fqns: tuple[str, ...]
    keep_gathered: bool
    own_dtype: bool


def plan_units(model: nn.Module, entries: Sequence[Entry], config: FSDPConfig) -> tuple[Unit, ...]:
    """Choose the units of a model, inner ones first; the root, which takes what is left, is not among them.

    Each decoder layer becomes a unit; so do the input embedding and the output head, together where they are tied, and
    each module that its model's class keeps in float32.
    A parameter tied between two units joins them, since FSDP2 keeps a parameter in one group only; where one module
    lies inside the other, the outer one becomes the unit.

    Args:
        model: Not sharded yet.
        entries: Of the model.
        config: Holds `auto_wrap_policy` and `wrap_classes`.

    Returns:
        Units in the order in which to shard them.

    Raises:
        ConfigurationError: A wrap class does not occur in the model.
    """
    layers = _layer_fqns(model, config)
    embedding, head = _embedding_and_head(model) if config.auto_wrap_policy == "transformer" else (None, None)
    extras = [fqn for fqn in (embedding, head) if fqn is not None and fqn not in layers]
    pinned = [fqn for fqn in pinned_modules(model) if fqn not in (*layers, *extras)]
    groups = _join_tied(model, entries, [[fqn] for fqn in (*layers, *extras, *pinned)])
    # Inner modules first: a unit takes the parameters below it that no earlier unit has.
    groups.sort(key=lambda group: -max(fqn.count(".") for fqn in group))
    return tuple(
        Unit(
            fqns=tuple(group),
            keep_gathered=head in extras and head in group,
            own_dtype=all(fqn in pinned for fqn in group),
        )
        for group in groups
    )


def apply_checkpointing(model: nn.Module, config: FSDPConfig) -> None:
    """Wrap each layer that becomes a unit in torch's activation checkpointing, if the options ask for it."""
    if not config.activation_checkpointing:
        return
    model_config: Any = getattr(model, "config", None)
    if getattr(model_config, "use_cache", False):
        # A cache that grows in forward would grow once more when backward recomputes it.
        model_config.use_cache = False
        _log.info("activation_checkpointing: config.use_cache is set to False")
    layers = [model.get_submodule(fqn) for fqn in _layer_fqns(model, config)]
    chosen = {id(layer) for layer in layers if not isinstance(layer, CheckpointWrapper)}
    apply_activation_checkpointing(model, check_fn=lambda module: id(module) in chosen)


def _layer_fqns(model: nn.Module, config: FSDPConfig) -> list[str]:
    policy = config.auto_wrap_policy
    if policy == "none":
        return []
    if callable(policy):
        return [fqn for fqn, module in _inner_modules(model) if policy(_unwrapped(module))]
    if config.wrap_classes is not None:
        found = _instances(model, config.wrap_classes)
        missing = [_class_name(cls) for cls in config.wrap_classes if not _instances(model, (cls,))]
        if missing:
            raise ConfigurationError(
                f"fsdp_config['wrap_classes']: expected classes of modules in {type(model).__name__}, got "
                f"{', '.join(missing)}, of which there is none. Classes that occur: "
                f"{', '.join(sorted({type(m).__name__ for _, m in _inner_modules(model)}))}."
            )
        return found
    named = getattr(model, "_no_split_modules", None) or ()
    return _instances(model, named) or _list_entries(model)


def _instances(model: nn.Module, classes: Iterable[str | type[nn.Module]]) -> list[str]:
    names = {cls for cls in classes if isinstance(cls, str)}
    types = tuple(cls for cls in classes if not isinstance(cls, str))
    return [
        fqn
        for fqn, module in _inner_modules(model)
        if type(_unwrapped(module)).__name__ in names or isinstance(_unwrapped(module), types)
    ]


def _list_entries(model: nn.Module) -> list[str]:
    """Return the entries of the outermost module lists: the layers of a model that does not name them."""
    found: list[str] = []
    for fqn, module in _inner_modules(model):
        inside = bool(found) and fqn.startswith(f"{found[-1]}.")  # what is inside of a module follows it
        parent = None if inside else model.get_submodule(fqn.rpartition(".")[0])
        if isinstance(parent, nn.ModuleList) and any(True for _ in module.parameters()):
            found.append(fqn)
    return found


def _inner_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    known: dict[str, nn.Module] = {}  # a parent comes before its children
    for fqn, module in named_modules_of(model):
        known[fqn] = module
        parent = known[fqn.rpartition(".")[0]] if fqn else None
        is_container = isinstance(
            module, (nn.ModuleList, nn.ModuleDict)
        )  # never called, so they cannot be units
        if fqn and not is_container and not isinstance(parent, CheckpointWrapper):
            yield fqn, module


def _unwrapped(module: nn.Module) -> nn.Module:
    return module._checkpoint_wrapped_module if isinstance(module, CheckpointWrapper) else module


def _class_name(cls: str | type[nn.Module]) -> str:
    return cls if isinstance(cls, str) else cls.__name__


def _embedding_and_head(model: nn.Module) -> tuple[str | None, str | None]:
    """Return the names of a transformers model's input embedding and output head, where it has them."""
    names = {id(module): fqn for fqn, module in _inner_modules(model)}
    found: list[str | None] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, getter)() if hasattr(model, getter) else None
        except NotImplementedError:  # transformers: a model without token embeddings
            module = None
        found.append(names.get(id(module)))
    return found[0], found[1]


def _join_tied(model: nn.Module, entries: Sequence[Entry], groups: list[list[str]]) -> list[list[str]]:
    owner = {fqn: index for index, group in enumerate(groups) for fqn in group}
    for entry in entries:
        if entry.role != "parameter" or len(entry.slots) < 2:
            continue
        holders = _module_fqns(model, [slot.module for slot in entry.slots])
        indices = {_owner_index(fqn, owner) for fqn in holders}
        if len(indices) < 2:
            continue
        joined: list[str] = []
        for fqn in holders:
            index = _owner_index(fqn, owner)
            joined += groups[index] if index is not None else [fqn]
        for index in sorted((i for i in indices if i is not None), reverse=True):
            del groups[index]
        joined = _outermost(joined)
        if joined != [""]:  # the root takes what is tied to a parameter of its own
            groups.append(joined)
        owner = {fqn: index for index, group in enumerate(groups) for fqn in group}
    return groups


def _module_fqns(model: nn.Module, modules: Iterable[nn.Module]) -> list[str]:
    names: dict[int, str] = {}
    for fqn, module in named_modules_of(model):
        names.setdefault(id(module), fqn)
    return [names[id(module)] for module in modules]


def _owner_index(fqn: str, owner: dict[str, int]) -> int | None:
    """Return the index of the innermost unit that holds a module; None where it is left to the root."""
    while fqn:
        if fqn in owner:
            return owner[fqn]
        fqn = fqn.rpartition(".")[0]
    return None


def _outermost(fqns: list[str]) -> list[str]:
    """Leave out modules inside of others: BERT ties the head's bias to a parameter of the module around it."""
    unique = list(dict.fromkeys(fqns))
    if "" in unique:
        return [""]
    return [fqn for fqn in unique if not any(fqn.startswith(f"{outer}.") for outer in unique)]


def refuse_wrapped(model: nn.Module) -> None:
    """Raise if a model, or a part of it, is sharded already.

    Raises:
        AlreadyWrappedError: Naming the module that went through `fully_shard`.
        UnsupportedParameterError: Naming a parameter that is a DTensor for another reason.
    """
    modules = modules_by_prefix(model)
    for prefix, module in modules:
        if isinstance(module, FSDPModule):
            raise AlreadyWrappedError(
                f"wrap_model: expected a model that is not sharded, got {prefix[:-1] or type(model).__name__} under "
                "fully_shard already. Call wrap_model once per model; a wrapped model is used as it is."
            )
    for name, parameter in (
        (f"{prefix}{name}", p) for prefix, m in modules for name, p in m._parameters.items()
    ):
        if isinstance(parameter, DTensor):
            raise UnsupportedParameterError(
                f"{name}: expected a plain tensor, got a DTensor with placements {parameter.placements}. "
                "Wrap a model that is not distributed yet; tensor parallelism cannot be combined with the strategies "
                "in this version."
            )


def refuse_aliases(entries: Sequence[Entry]) -> None:
    """Raise if a parameter is also kept as a buffer or plain attribute, which sharding would leave behind.

    Raises:
        UnsupportedParameterError: Naming the parameter and its other name.
    """
    parameters = {id(entry.tensor): entry.fqn for entry in entries if entry.role == "parameter"}
    for entry in entries:
        if entry.role != "parameter" and id(entry.tensor) in parameters:
            raise UnsupportedParameterError(
                f"{parameters[id(entry.tensor)]}: expected one registration as a parameter, got the same tensor as "
                f"{entry.role} {entry.fqn}, which would keep the full values while the parameter is sharded. Remove the "
                "second name, or look the parameter up when it is needed."
            )


def ignored_parameters(entries: Sequence[Entry], config: FSDPConfig) -> set[nn.Parameter]:
    """Return the parameters that FSDP2 must leave alone: those the caller names, and frozen ones it cannot shard.

    Raises:
        ConfigurationError: A name is not a parameter of the model.
        UnsupportedParameterError: A trainable parameter is a scalar or has no elements, or one is not contiguous.
    """
    named = {slot.fqn: e.tensor for e in entries if e.role == "parameter" for slot in e.slots}
    unknown = [name for name in config.ignored_params if name not in named]
    if unknown:
        raise ConfigurationError(
            f"fsdp_config['ignored_params']: expected names of parameters, got {listed(unknown)}, which the model "
            "does not have"
        )
    ignored = {named[name] for name in config.ignored_params}
    for name, parameter in named.items():
        if parameter in ignored or (parameter.ndim > 0 and parameter.numel() > 0):
            continue
        if parameter.requires_grad:
            kind = (
                "scalar"
                if parameter.ndim == 0
                else f"parameter without elements, shape {tuple(parameter.shape)},"
            )
            remedy = "Give it shape (1,), freeze" if parameter.ndim == 0 else "Remove it, freeze"
            raise UnsupportedParameterError(
                f"{name}: expected a trainable parameter with at least one dim and one element, got a {kind} which "
                f"FSDP2 cannot train. {remedy} it with requires_grad_(False), or name it in "
                "fsdp_config['ignored_params'] and synchronise its gradient yourself."
            )
        ignored.add(parameter)
    for name, parameter in named.items():
        if parameter not in ignored and not parameter.is_contiguous():
            raise UnsupportedParameterError(
                f"{name}: expected a contiguous parameter, got strides {parameter.stride()} for shape "
                f"{tuple(parameter.shape)}, which FSDP2 cannot shard. Replace it by a parameter of its .contiguous() "
                "values, or name it in fsdp_config['ignored_params'] and synchronise its gradient yourself."
            )
    return ignored  # type: ignore[return-value]


def refuse_mixed_dtypes(model: nn.Module, units: tuple[Unit, ...], ignored: set[nn.Parameter]) -> None:
    """Raise if a unit's trainable parameters have several dtypes, which FSDP2 refuses at the first forward.

    Raises:
        UnsupportedParameterError: Naming a parameter of each dtype.
    """
    taken = {id(parameter) for parameter in ignored}
    for fqns in [*(unit.fqns for unit in units), ("",)]:
        by_dtype: dict[torch.dtype, str] = {}
        for fqn in fqns:
            for within, module in named_modules_of(model.get_submodule(fqn)):
                for name, parameter in module._parameters.items():
                    if parameter is None or id(parameter) in taken:
                        continue
                    taken.add(id(parameter))
                    if parameter.requires_grad and parameter.dtype not in by_dtype:
                        by_dtype[parameter.dtype] = clean_fqn(".".join(filter(None, (fqn, within, name))))
        if len(by_dtype) > 1:
            examples = ", ".join(f"{name} is {dtype_name(d)}" for d, name in by_dtype.items())
            raise UnsupportedParameterError(
                f"{' + '.join(fqns) or 'the root unit'}: expected trainable parameters of one dtype, got {examples}. "
                "FSDP2 gathers a unit in one dtype: load with one dtype (dtype=torch.float32; of an adapter, "
                "autocast_adapter_dtype=False keeps the base's), freeze the odd ones, or make their module a unit of its own with "
                "fsdp_config['wrap_classes']."
            )
