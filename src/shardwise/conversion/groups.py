"""What a model library declares about a checkpoint: which stored tensors become which tensors of the model together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

Convert = Callable[[Mapping[str, list[torch.Tensor]]], Mapping[str, torch.Tensor]]
"""From full source tensors by pattern, in order, to full tensors by their names in the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionGroup:
    """Stored tensors that become tensors of the model together.

    Args:
        target: Name in the model of the first result, or of the only one.
        targets: Names in the model of all results that it may have.
        sources: Checkpoint names by pattern, each list in the order in which the conversion takes them. A pattern is what
            the conversion itself calls its input.
        convert: Makes the results; None where the only source is the result as it is.
        operations: What it does, in words, for messages.
    """

    target: str
    targets: tuple[str, ...]
    sources: Mapping[str, tuple[str, ...]]
    convert: Convert | None
    operations: str

    @property
    def source_names(self) -> tuple[str, ...]:
        """All checkpoint names that it takes."""
        return tuple(name for names in self.sources.values() for name in names)


def renamed_group(name: str, target: str) -> ConversionGroup:
    """Return the group that takes one tensor as it is, under another name."""
    return ConversionGroup(
        target=target, targets=(target,), sources={name: (name,)}, convert=None, operations=""
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """All groups of a model, and what it says about names that have no partner.

    Args:
        groups: In the order of the checkpoint's names.
        unexpected: Names, as the model would call them, that nothing in it takes.
        may_be_absent: Says of a name in the model whether the model's class declares that a checkpoint may lack it.
        may_be_unexpected: The same of a name that nothing in the model takes.
        tied_to: Says of a name in the model of which other one its class makes it a further name; None where of none.
    """

    groups: tuple[ConversionGroup, ...]
    unexpected: tuple[str, ...]
    may_be_absent: Callable[[str], bool]
    may_be_unexpected: Callable[[str], bool]
    tied_to: Callable[[str], str | None]


def any_of(patterns: Iterable[str] | None) -> Callable[[str], bool]:
    """Return what says of a name whether one of some regular expressions is found in it."""
    compiled = [re.compile(pattern) for pattern in patterns or ()]
    return lambda name: any(pattern.search(name) for pattern in compiled)
