"""How PEFT starts an adapter: LoRA's B is zero, whatever the model around it does with linear layers.

PEFT initialises a layer while it builds it, from the adapter's config, and keeps no record but `peft_config`. Its methods
are called here on blank copies. Checked on peft 0.17 to 0.21; `tests/unit/test_peft_rule.py` compares with what PEFT builds.
Source: `peft.tuners.lora.layer.LoraLayer.update_layer`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from shardwise.errors import ConfigurationError

# Variants that change the forward alone; the others make A and B, or more parameters, in ways of their own.
_VARIANTS_THAT_START_AS_LORA = ("ALora", "Dora")
_TOKENS = "trainable_token_indices, whose rows start as those of the base's embedding"
_FROM_VALUES = "which PEFT makes from the base model's values or from data when it is built"
_MAGNITUDE = "a magnitude of DoRA, the norm of the base weight's rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftRule:
    """What makes parameters of one adapter in one layer.

    Args:
        owner: Fqn of what its random numbers belong to: the adapter in the layer, where A and B come of the same ones, or else
            one parameter of it. So no two adapters start alike, which would then never differ.
        calls: One after the other.
    """

    owner: str
    calls: Sequence[Callable[[], None]]


def peft_rule(around: Sequence[nn.Module], fqn: str, names: Sequence[str]) -> list[PeftRule] | None:
    """Return what makes parameters of a PEFT layer's adapters, or None where they belong to no such layer.

    Args:
        around: The module that has them and those around it, the innermost first.
        fqn: Of the module.
        names: Of the parameters that are wanted, in the module.

    Returns:
        One rule for each adapter that the module has parameters of.

    Raises:
        ConfigurationError: The adapter starts from values of the base model, from data, or in a way not known here.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return None
    parts = fqn.split(".")
    for depth, layer in enumerate(around):
        if not isinstance(layer, tuners.BaseTunerLayer):
            continue
        below = parts[len(parts) - depth :] if depth else []
        paths = [[*below, name] for name in names]
        if not all(path[0] in layer.adapter_layer_names for path in paths):
            return None  # the base layer's own
        of_layer = ".".join(parts[: len(parts) - depth])
        rules: dict[str, PeftRule] = {}
        for path, name in zip(paths, names, strict=True):
            adapter = path[1] if len(path) > 1 else ""
            if adapter not in rules:
                rules[adapter] = _start_of(around[depth:], of_layer, path[0], adapter, f"{fqn}.{name}")
        return list(rules.values())
    return None


def needs_base_values(config: Any) -> str | None:
    """Return, in words, what a new adapter of a config starts from besides random numbers; None where it is nothing.

    Args:
        config: Of PEFT. Only what LoRA starts from is known.
    """
    if getattr(config, "use_dora", False):
        return _MAGNITUDE
    how = getattr(config, "init_lora_weights", True)
    return None if _is_random(how) else f"an adapter with init_lora_weights={how!r}"


def _start_of(around: Sequence[nn.Module], of_layer: str, kind: str, adapter: str, fqn: str) -> PeftRule:
    from peft.tuners.lora.layer import LoraLayer

    layer: Any = around[0]
    configs = (getattr(each, "peft_config", None) for each in around)
    config: Any = next((found[adapter] for found in configs if found and adapter in found), None)
    if kind == "trainable_tokens_delta":
        raise ConfigurationError(
            f"{fqn}: expected an adapter that starts from random numbers or from stored rows, got {_TOKENS}, of which no checkpoint "
            "is at hand. Load the model with load_pretrained, and embeddings that are resized with load_pretrained(defer=False); or "
            "train all rows: modules_to_save=['embed_tokens']."
        )
    is_lora = getattr(type(layer), "reset_lora_parameters", None) is LoraLayer.reset_lora_parameters
    if not is_lora or config is None:
        kind = type(layer).__module__.split(".")[-2]
        raise _refusal(fqn, f"a {type(layer).__name__} of PEFT's {kind}, whose start is known to PEFT alone")
    variant = type(layer.lora_variant[adapter]).__name__ if adapter in layer.lora_variant else ""
    if kind == "lora_magnitude_vector":
        raise _refusal(fqn, f"{_MAGNITUDE}, {_FROM_VALUES}")
    if variant and not variant.startswith(_VARIANTS_THAT_START_AS_LORA):
        raise _refusal(fqn, f"an adapter of the variant {variant}, whose start is known to PEFT alone")
    how = config.init_lora_weights
    if not _is_random(how):
        raise _refusal(fqn, f"an adapter with init_lora_weights={how!r}, {_FROM_VALUES}")
    owner = f"{of_layer}.{adapter}"
    if how is False:  # as torch builds the layers that the adapter consists of
        built = getattr(getattr(layer, kind)[adapter], "reset_parameters", None)
        return PeftRule(owner=f"{owner}.{kind}", calls=[built] if callable(built) else [])
    if how is True or (isinstance(how, str) and how.lower() == "gaussian"):
        return PeftRule(owner=owner, calls=[partial(layer.reset_lora_parameters, adapter, how)])
    return PeftRule(owner=owner, calls=[partial(layer.orthogonal_init, adapter)])


def _is_random(how: bool | str) -> bool:
    return isinstance(how, bool) or how.lower() == "gaussian" or how == "orthogonal"


def _refusal(fqn: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{fqn}: expected an adapter of LoRA that starts from random numbers (init_lora_weights=True, 'gaussian' or "
        f"'orthogonal'), got {what}. Load the "
        "model with load_pretrained(defer=False) and put the adapter into it with strategy.add_adapter, or give materialize a "
        "checkpoint of the adapter."
    )
