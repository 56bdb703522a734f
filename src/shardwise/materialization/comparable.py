"""What must be equal on all ranks, and what to say where it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparable:
    """Something that must be equal on all ranks.

    Args:
        what: Its name in a message, for example "the model's structure".
        digest: Equal exactly where it is.
        details: Returns it as text; called only where digests differ.
        explain: Says how two such texts, expected and got, differ.
        remedy: What the user can do.
    """

    what: str
    digest: str
    details: Callable[[], str]
    explain: Callable[[str, str], str]
    remedy: str
