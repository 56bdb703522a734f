"""What a comparison needs beyond the package's own dependencies, looked for before anything is run."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from shardwise.compare.modes import Mode
from shardwise.errors import MissingDependencyError


def require_for_modes(modes: Iterable[Mode]) -> None:
    """Raise unless every mode can run.

    Raises:
        MissingDependencyError: Naming the modes and the extra.
    """
    needing = [mode.name for mode in modes if mode.strategy == "accelerate"]
    if needing and find_spec("accelerate") is None:
        raise MissingDependencyError(
            f"{', '.join(needing)}: expected accelerate, which is not installed. Install it with: pip install "
            "'shardwise[accelerate]', or name other modes with --mode."
        )


def require_for_demo() -> None:
    """Raise unless the demo can run all its modes and draw its picture.

    Raises:
        MissingDependencyError: Naming the packages and the extra.
    """
    missing = [name for name in ("accelerate", "matplotlib") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"shardwise demo: expected {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            "Install what the demo needs with: pip install 'shardwise[demo]'"
        )
