"""What ranks compare with each other: a model's structure with options, and values by digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import torch

from shardwise.materialization.comparable import Comparable
from shardwise.materialization.structure import Structure, structure_difference

_MOST_LINES = 5
_LONGEST_LINE = 400


def comparable_structure(structure: Structure, more: Sequence[str], *, remedy: str) -> Comparable:
    """Return what makes ranks compare the structure of a model.

    Args:
        structure: Of the model.
        more: Further lines that must be equal, for example of options.
        remedy: What the user can do where they are not.
    """
    described = Structure(lines=(*structure.lines, *more))
    return Comparable(
        what="the model or an option",
        digest=described.digest,
        details=described.to_json,
        explain=lambda expected, got: structure_difference(expected, got, limit=_MOST_LINES),
        remedy=remedy,
    )


def comparable_lines(what: str, lines: Sequence[str], *, remedy: str) -> Comparable:
    """Return what makes ranks compare lines of text.

    Args:
        what: Name of the whole in a message.
        lines: The same on all ranks, or a mismatch.
        remedy: What the user can do where they are not.
    """
    described = Structure(lines=tuple(lines))
    return Comparable(
        what=what,
        digest=described.digest,
        details=lambda: json.dumps(
            [f"{line[:_LONGEST_LINE]}..." if len(line) > _LONGEST_LINE else line for line in lines]
        ),
        explain=lambda expected, got: structure_difference(expected, got, limit=_MOST_LINES),
        remedy=remedy,
    )


def comparable_digests(
    what: str, digests: Mapping[str, str], *, explain: Callable[[list[str]], str], remedy: str
) -> Comparable:
    """Return what makes ranks compare values by name.

    Args:
        what: Name of the values in a message.
        digests: By name of the tensor.
        explain: Says that the tensors of these names differ.
        remedy: What the user can do.
    """
    text = json.dumps(digests)
    return Comparable(
        what=what,
        digest=hashlib.sha256(text.encode()).hexdigest(),
        details=lambda: text,
        explain=lambda expected, got: explain(_differing(expected, got)),
        remedy=remedy,
    )


def digest_of(content: torch.Tensor, *, kind: str = "") -> str:
    """Return a short digest of a tensor's bytes, and of a text that must be equal too."""
    flat = content.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(kind.encode() + flat.numpy().tobytes()).hexdigest()[:16]


def _differing(expected_json: str, got_json: str) -> list[str]:
    expected, got = json.loads(expected_json), json.loads(got_json)
    return [name for name in expected if expected[name] != got.get(name)]
