"""Which declaration counts for a model: that of the library it is from, by its installed generation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shardwise.conversion.groups import ConversionGroup, Declaration
from shardwise.errors import ConfigurationError


def is_transformers_model(model: nn.Module) -> bool:
    """Return whether a module is a model of transformers; it is not imported to find out."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def declaration_of(
    model: nn.Module,
    expected: Mapping[str, torch.Size],
    names: Iterable[str],
    *,
    conversions: Sequence[Any] | None,
) -> Declaration:
    """Return how a checkpoint's tensors become a model's.

    Args:
        model: Any module. A transformers model's own declaration counts; others take each tensor by its name.
        expected: Shapes by the names that a checkpoint of it would give its tensors.
        names: Checkpoint names.
        conversions: transformers' transforms to use in place of the model's own; none may be given for other modules.

    Returns:
        The declaration.
    """
    if is_transformers_model(model):
        return generation().declaration_of(model, expected, names, conversions=conversions)  # type: ignore[no-any-return]
    if conversions:
        raise ConfigurationError(
            f"conversions: expected a transformers model to use them with, got {type(model).__name__}. Use rename= for other "
            "names."
        )
    names = list(names)
    return Declaration(
        groups=tuple(
            ConversionGroup(
                target=name, targets=(name,), sources={name: (name,)}, convert=None, operations=""
            )
            for name in names
            if name in expected
        ),
        unexpected=tuple(name for name in names if name not in expected),
        may_be_absent=lambda _: False,
        may_be_unexpected=lambda _: False,
        tied_to=lambda _: None,
    )


def pinned_dtypes(
    model: nn.Module, dtype: torch.dtype, *, stored: bool
) -> Callable[[str], torch.dtype | None]:
    """Return what says of a name in the model in which dtype its class keeps it when the rest is in `dtype`.

    Args:
        model: Any module; only transformers models have such classes.
        dtype: Of the rest.
        stored: Whether a checkpoint holds the tensors that will be asked for. transformers 5 initialises the others in
            `dtype`, whatever their class says; 4.57 makes no difference.
    """
    if is_transformers_model(model):
        return generation().pinned_dtypes(model, dtype, stored=stored)  # type: ignore[no-any-return]
    return lambda _: None


def generation() -> Any:
    """Return the module that speaks for the installed generation of transformers."""
    import transformers

    from shardwise.conversion import transformers4, transformers5

    return transformers5 if int(transformers.__version__.split(".")[0]) >= 5 else transformers4
