"""What transformers 4.57 declares about a model's checkpoint: renamings alone.

Its models keep weights as their checkpoints do. A name may need the base model's prefix, or lose it; vision-language models
declare patterns; and a few very old names are translated. The model's own method does all of it.

Checked on 4.57; `tests/unit/test_transformers_declarations.py` says what has moved when a release changes it.
Source: `transformers.modeling_utils.PreTrainedModel._load_pretrained_model`, `_get_key_renaming_mapping` (4.57).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from shardwise.conversion.groups import ConversionGroup, Declaration, any_of, renamed_group
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
        conversions: Not on this generation.

    Returns:
        The declaration.

    Raises:
        ConfigurationError: Conversions were given.
        UnsupportedVersionError: The installed transformers declares it in another way.
    """
    if conversions:
        raise ConfigurationError(
            "conversions: transformers 4.57 has no weight conversions to take, got some. Use rename= for other names, or "
            "transformers 5.17 or newer."
        )
    names = list(names)
    target_of = _renamed(model, names)
    groups = [
        ConversionGroup(
            target=target, targets=(target,), sources={name: (name,)}, convert=None, operations=""
        )
        for name, target in target_of.items()
        if target in expected
    ]
    taken = {name for group in groups for name in group.source_names}
    buffers = {name for name, _ in model.named_buffers()}
    return Declaration(
        groups=tuple(groups),
        unexpected=tuple(target_of.get(name, name) for name in names if name not in taken),
        may_be_absent=any_of(model._keys_to_ignore_on_load_missing),
        may_be_unexpected=_may_be_unexpected(model, buffers),
        tied_to=_head_and_embedding(model).get,
    )


def _head_and_embedding(model: Any) -> dict[str, str]:
    """Return the name of the head's weight with that of the embedding's, where the config ties the two."""
    if not getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False):
        return {}
    try:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    except NotImplementedError:  # CLIP's has several embeddings, and no head
        return {}
    name_of = {module: name for name, module in model.named_modules()}
    if head not in name_of or embedding not in name_of:
        return {}
    return {f"{name_of[head]}.weight": f"{name_of[embedding]}.weight"}


def pinned_dtypes(model: Any, dtype: torch.dtype, *, stored: bool) -> Callable[[str], torch.dtype | None]:
    """Return what says of a name in the model in which dtype its class keeps it when the rest is in `dtype`.

    The same for what is `stored` and for what the loader initialises.
    """
    del stored
    modules: list[str] = []
    if dtype == torch.float16:
        modules += model._keep_in_fp32_modules or ()
    if dtype in (torch.float16, torch.bfloat16):
        modules += getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    found = any_of(rf"(^|\.){module}($|\.)" for module in modules)
    return lambda name: torch.float32 if found(name) else None


def saved_groups(
    model: Any, shapes: Mapping[str, torch.Size], ties: Sequence[Sequence[str]]
) -> list[ConversionGroup]:
    """Return under which names a model's tensors are saved, as `save_pretrained` does it.

    Args:
        model: A transformers model; its values are not looked at.
        shapes: Of its persistent tensors, by all of their names, in the order of its state dict.
        ties: Names of one tensor, for each that has several.

    Raises:
        UnsupportedParameterError: The model's class does not declare a tie.
        UnsupportedVersionError: The installed transformers saves in another way.

    Source: `transformers.modeling_utils.PreTrainedModel.save_pretrained` (4.57).
    """
    try:
        from transformers.modeling_utils import _get_tied_weight_keys

        final = {name: model._fix_state_dict_key_on_save(_as_stored(model, name))[0] for name in shapes}
    except (ImportError, AttributeError) as error:
        raise UnsupportedVersionError(
            f"expected a PreTrainedModel that saves as in transformers 4.57, got {error}. Install 4.57 or 5.17 and newer."
        ) from error
    ignored = set(model._keys_to_ignore_on_save or ())
    name_of = {stored: name for name, stored in final.items()}
    kept = saved_names(
        [name for name in final.values() if name not in ignored],
        [[final[name] for name in names] for names in ties],
        is_tied=any_of(_get_tied_weight_keys(model)),
    )
    return [renamed_group(name_of[name], name) for name in kept]


def _as_stored(model: Any, name: str) -> str:
    for pattern, replacement in (_patterns_of(model) or {}).items():
        back = re.sub(
            r"\(.*\)", "", pattern.lstrip("^")
        )  # a pattern's text is the name's, but for anchors and groups
        name, found = re.subn(replacement, back, name)
        if found:
            break
    return name


def _renamed(model: Any, names: Sequence[str]) -> Mapping[str, str]:
    prefix: str = model.base_model_prefix
    has_prefix = bool(prefix) and any(name.startswith(prefix) for name in names)
    expects_prefix = bool(prefix) and hasattr(model, prefix)
    try:
        renamed: Mapping[str, str] = model._get_key_renaming_mapping(
            list(names),
            _patterns_of(model),
            loading_base_model_from_task_state_dict=has_prefix and not expects_prefix,
            loading_task_model_from_base_state_dict=expects_prefix and not has_prefix,
        )
    except (AttributeError, TypeError) as error:
        import transformers

        raise UnsupportedVersionError(
            f"expected PreTrainedModel._get_key_renaming_mapping as in transformers 4.57, got {error} from "
            f"{transformers.__version__}. Install 4.57 or 5.17 and newer, or use load_pretrained(defer=False)."
        ) from error
    return renamed


def _patterns_of(model: Any) -> Mapping[str, str] | None:
    from transformers import modeling_utils

    classes = [cls.__name__.lower() for cls in type(model).__mro__[:-1]]
    if any(allowed in name for name in classes for allowed in getattr(modeling_utils, "VLMS", ())):
        patterns: Mapping[str, str] = model._checkpoint_conversion_mapping
        return patterns
    return None


def _may_be_unexpected(model: Any, buffers: set[str]) -> Callable[[str], bool]:
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(re.escape("rotary_emb.inv_freq"))
    found = any_of(patterns)
    return lambda name: name in buffers or found(name)
