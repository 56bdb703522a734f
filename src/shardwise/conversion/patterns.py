"""Regular expressions that are compiled when they are first searched for.

transformers 5 makes the renamings of all its models when it is asked for those of one: about a thousand expressions, of which a
load searches for a few. Compiling them all is as much work as sharding a model of a billion parameters on meta.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class PatternOnUse:
    """What `re.compile` returns, made at its first use.

    Args:
        pattern: The expression.
        flags: Of `re`.
    """

    __slots__ = ("_arguments", "_compiled")

    def __init__(self, pattern: str, flags: int = 0) -> None:
        self._arguments = (pattern, flags)
        self._compiled: re.Pattern[str] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols, copy's for one, ask whether there is such a method
            raise AttributeError(name)
        if self._compiled is None:
            self._compiled = re.compile(*self._arguments)
        return getattr(self._compiled, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return re.compile, self._arguments

    def __deepcopy__(self, memo: dict[int, Any]) -> PatternOnUse:
        return self  # as a compiled pattern's copy is itself


class _CompilesOnUse:
    """The module `re`, whose `compile` waits."""

    compile = PatternOnUse

    def __getattr__(self, name: str) -> Any:
        return getattr(re, name)


@contextmanager
def compiled_on_use(module: ModuleType) -> Iterator[None]:
    """Let what a module compiles in the body be compiled at its first use.

    Args:
        module: One that says `import re`; another is left as it is.
    """
    if getattr(module, "re", None) is not re:
        yield
        return
    module.re = _CompilesOnUse()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.re = re  # type: ignore[attr-defined]
