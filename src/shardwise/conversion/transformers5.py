"""What transformers 5 declares about a model's checkpoint, as conversion groups.

transformers keeps, for each kind of model, a list of renamings and of converters that turn several stored tensors into one
or the other way round. Its loader renames every stored name, collects what a converter takes, and runs the converter on
the tensors. The same functions are asked here for the names; the converters are only handed on.

Checked on 5.17 to 5.23; `tests/unit/test_transformers_declarations.py` says what has moved when a release changes them.
Source: `transformers.core_model_loading.convert_and_load_state_dict_in_model`, `transformers.conversion_mapping`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from shardwise.conversion.groups import ConversionGroup, Declaration, any_of, renamed_group
from shardwise.conversion.patterns import compiled_on_use
from shardwise.conversion.ties import saved_names
from shardwise.errors import ConfigurationError, UnsupportedVersionError


def declaration_of(
    model: Any, expected: Mapping[str, torch.Size], names: Iterable[str], *, conversions: Sequence[Any] | None
) -> Declaration:
    """Return how a checkpoint's tensors become a model's.

    Args:
        model: A transformers model; its values are not looked at.
        expected: Shapes by the names that a checkpoint of it would give its tensors.
        names: Checkpoint names.
        conversions: transformers' `WeightRenaming` and `WeightConverter` objects to use in place of the model's own.

    Returns:
        The declaration.

    Raises:
        UnsupportedVersionError: The installed transformers declares it in another way.
    """
    upstream = _upstream(_FOR_LOADING)
    mapping = list(conversions) if conversions is not None else _mapping_of(model, upstream)
    renamings = [entry for entry in mapping if isinstance(entry, upstream["WeightRenaming"])]
    converters = [entry for entry in mapping if isinstance(entry, upstream["WeightConverter"])]
    rename = _renaming(model.base_model_prefix, expected, renamings, converters, upstream)
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    collected: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    unexpected: list[str] = []
    for name in sorted(names, key=upstream["dot_natural_key"]):
        target, pattern = rename(name)
        if target not in expected:
            unexpected.append(target)
        elif pattern is None:
            collected.setdefault(target, (None, {}))[1].setdefault(name, []).append(name)
        else:
            of_target = collected.setdefault(target, (converter_of[pattern], {}))
            of_target[1].setdefault(pattern, []).append(name)
    # What save_pretrained reverses.
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]
    shapes = _Shapes(expected)
    names_of = _names_of(expected)
    return Declaration(
        groups=tuple(
            _group(shapes, model.config, target, names_of(target, converter), converter, sources)
            for target, (converter, sources) in collected.items()
        ),
        unexpected=tuple(unexpected),
        may_be_absent=any_of(model._keys_to_ignore_on_load_missing),
        may_be_unexpected=any_of(_unexpected_patterns(model)),
        tied_to=getattr(model, "all_tied_weights_keys", {}).get,
    )


_FOR_LOADING = {
    "transformers.core_model_loading": (
        "WeightConverter",
        "WeightRenaming",
        "dot_natural_key",
        "rename_source_key",
    ),
    "transformers.conversion_mapping": ("get_model_conversion_mapping",),
}
_FOR_SAVING = {
    "transformers.core_model_loading": (
        "PrefixChange",
        "WeightConverter",
        "WeightRenaming",
        "apply_converters",
        "apply_renamings",
        "dot_natural_key",
    ),
    "transformers.conversion_mapping": ("get_model_conversion_mapping",),
    "transformers.modeling_utils": ("_get_tied_weight_keys",),
}


def saved_groups(
    model: Any, shapes: Mapping[str, torch.Size], ties: Sequence[Sequence[str]]
) -> list[ConversionGroup]:
    """Return how a model's tensors become a checkpoint's, as `save_pretrained` does it.

    Args:
        model: A transformers model; its values are not looked at.
        shapes: Of its persistent tensors, by all of their names, in the order of its state dict.
        ties: Names of one tensor, for each that has several.

    Raises:
        ConfigurationError: A conversion has no way back.
        UnsupportedParameterError: The model's class does not declare a tie.
        UnsupportedVersionError: The installed transformers saves in another way.

    Source: `transformers.core_model_loading.revert_weight_conversion`.
    """
    upstream = _upstream(_FOR_SAVING)
    is_tied = any_of(upstream["_get_tied_weight_keys"](model))
    ignored = set(model._keys_to_ignore_on_save or ())
    names = saved_names([name for name in shapes if name not in ignored], ties, is_tied=is_tied)
    declared = getattr(model, "_weight_conversions", None)
    if declared is None:  # not loaded: a prefix that a checkpoint might have had is not added
        mapping = _mapping_of(model, upstream, add_legacy=False)
        declared = [entry for entry in mapping if not isinstance(entry, upstream["PrefixChange"])] or None
    if declared is None:
        return [renamed_group(name, name) for name in names]
    try:
        back = [entry.reverse_transform() for entry in declared[::-1]]
    except Exception as error:  # of somebody else's operation
        raise ConfigurationError(
            f"{type(model).__name__}: expected conversions with a way back to the checkpoint's layout, got "
            f"{type(error).__name__}: {error}. transformers itself cannot save this model in that layout either."
        ) from error
    renamings = [entry for entry in back if isinstance(entry, upstream["WeightRenaming"])]
    converters = [entry for entry in back if isinstance(entry, upstream["WeightConverter"])]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    collected: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for name in sorted(names, key=upstream["dot_natural_key"]):
        target, pattern = upstream["apply_converters"](name, converters)
        if pattern is None:
            target = upstream["apply_renamings"](name, renamings)
            collected.setdefault(target, (None, {}))[1].setdefault(name, []).append(name)
        else:
            of_target = collected.setdefault(target, (converter_of[pattern], {}))
            of_target[1].setdefault(pattern, []).append(name)

    def final(name: str) -> str:
        found: str = upstream["apply_renamings"](name, renamings)
        return found

    of_model = _Shapes(shapes)
    return [
        _group_back(of_model, model.config, target, converter, sources, final)
        if converter is not None
        else renamed_group(next(iter(sources)), target)
        for target, (converter, sources) in collected.items()
    ]


def _group_back(
    shapes: _Shapes,
    config: Any,
    target: str,
    converter: Any,
    sources: Mapping[str, list[str]],
    final: Callable[[str], str],
) -> ConversionGroup:
    group = _group(shapes, config, target, (), converter, sources)

    def convert(tensors: Mapping[str, list[torch.Tensor]]) -> Mapping[str, torch.Tensor]:
        made = group.convert(tensors)  # type: ignore[misc]
        return {final(name): tensor for name, tensor in made.items()}

    return replace(group, convert=convert)


def _upstream(names: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    found = {}
    for module, attributes in names.items():
        try:
            loaded = __import__(module, fromlist=list(attributes))
            found.update({name: getattr(loaded, name) for name in attributes})
        except (ImportError, AttributeError) as error:
            import transformers

            raise UnsupportedVersionError(
                f"expected {', '.join(attributes)} in {module}, as in transformers 5.17 to 5.23, got {error} from "
                f"{transformers.__version__}. Install one of these, or use load_pretrained(defer=False)."
            ) from error
    return found


def _mapping_of(model: Any, upstream: Mapping[str, Any], **kwargs: Any) -> list[Any]:
    """Return transformers' own `WeightRenaming` and `WeightConverter` objects of a model."""
    with _in_own_classes(model), compiled_on_use(sys.modules["transformers.core_model_loading"]):
        mapping: list[Any] = upstream["get_model_conversion_mapping"](model, **kwargs)
    return mapping


@contextmanager
def _in_own_classes(model: Any) -> Iterator[None]:
    """Give modules back the classes that torch has put others in front of, as `fully_shard` does, while the context is open.

    transformers looks up what it declares by a class's name, and takes a class of another package for custom code, of which it
    declares nothing.
    """
    from transformers import PreTrainedModel

    changed = {}
    for module in model.modules():
        cls = type(module)
        if isinstance(module, PreTrainedModel) and cls.__module__.startswith("torch."):
            changed[module] = cls
            module.__class__ = next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))
    try:
        yield
    finally:
        for module, cls in changed.items():
            module.__class__ = cls


class _Shapes:
    """What a converter may ask a model for: the shape of a parameter.

    Args:
        shapes: By name.
    """

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self._shapes = shapes

    def get_parameter(self, name: str) -> torch.Tensor:
        """Return a tensor of the parameter's shape, on meta."""
        return torch.empty(self._shapes[name], device="meta")

    get_parameter_or_buffer = get_parameter


def _renaming(
    prefix: str,
    expected: Mapping[str, torch.Size],
    renamings: list[Any],
    converters: list[Any],
    upstream: Mapping[str, Any],
) -> Callable[[str], tuple[str, str | None]]:
    rename_source_key = upstream["rename_source_key"]

    def rename(name: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:  # a name of the model that a pattern happens to fit
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        return target, pattern

    return rename


def _names_of(expected: Mapping[str, torch.Size]) -> Callable[[str, Any | None], tuple[str, ...]]:
    def names_of(target: str, converter: Any | None) -> tuple[str, ...]:
        """Return the model's names of all results: a converter's first pattern stands in `target` for each of the others."""
        if converter is None:
            return (target,)
        first, *others = converter.target_patterns
        found = [target, *(target.replace(first, other, 1) for other in others)]
        numbered = [re.compile(re.escape(name).replace(r"\*", r"\d+")) for name in found if "*" in name]
        found += [name for name in expected if any(pattern.fullmatch(name) for pattern in numbered)]
        return tuple(name for name in dict.fromkeys(found) if name in expected)

    return names_of


def _group(
    shapes: _Shapes,
    config: Any,
    target: str,
    targets: tuple[str, ...],
    converter: Any | None,
    sources: Mapping[str, list[str]],
) -> ConversionGroup:
    named = {pattern: tuple(names) for pattern, names in sources.items()}
    if converter is None:
        return ConversionGroup(target=target, targets=targets, sources=named, convert=None, operations="")

    def convert(tensors: Mapping[str, list[torch.Tensor]]) -> Mapping[str, torch.Tensor]:
        fresh = deepcopy(converter)
        for pattern, values in tensors.items():
            fresh.collected_tensors[pattern] = list(values)
        made = fresh.convert(target, model=shapes, config=config)
        return {name: made_of[0] if isinstance(made_of, list) else made_of for name, made_of in made.items()}

    operations = " + ".join(type(operation).__name__ for operation in converter.operations)
    return ConversionGroup(
        target=target, targets=targets, sources=named, convert=convert, operations=operations
    )


def _unexpected_patterns(model: Any) -> set[str]:
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    # Older checkpoints hold these buffers, which are made anew today.
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return patterns


def pinned_dtypes(model: Any, dtype: torch.dtype, *, stored: bool) -> Callable[[str], torch.dtype | None]:
    """Return what says of a name in the model in which dtype its class keeps it when the rest is in `dtype`.

    The loader looks at it when it reads a tensor; what it initialises stays in `dtype`.
    """
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype) if stored else {}
    compiled = [(re.compile(pattern.replace("*", ".*")), pinned) for pattern, pinned in plan.items()]
    return lambda name: next((pinned for pattern, pinned in compiled if pattern.search(name)), None)
