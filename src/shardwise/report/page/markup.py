"""HTML that is escaped unless it was made here: text can hold whatever a model is called."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any, Final

_VOID: Final = frozenset(
    {"input", "link", "meta", "polyline", "rect", "line"}
)  # without an end tag, or closed in itself


class Markup(str):
    """HTML, as opposed to text that is still to be escaped."""

    __slots__ = ()


def element(tag: str, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """Make one element.

    Args:
        tag: Its name.
        children: Its content in order; what is no `Markup` is escaped, None is left out.
        attributes: By name, with `_` for `-` and without one at the end (`class_`); None and False are left out, and True
            stands for itself.
    """
    written = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in _VOID:
        return Markup(f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")


def join(parts: Iterable[str | None]) -> Markup:
    """Put parts one after the other; what is no `Markup` is escaped, None is left out."""
    return Markup("".join(_escaped(part) for part in parts if part is not None))


def data_script(value: Any, **attributes: str) -> Markup:
    """Make an element that holds data for a script.

    Args:
        value: Plain data.
        attributes: Of the element.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    # Nothing in it may end the element, or open a comment.
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return element("script", Markup(text), type="application/json", **attributes)


def _escaped(part: str) -> str:
    return part if isinstance(part, Markup) else html.escape(part, quote=True)


def _attribute(name: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    written = name.rstrip("_").replace("_", "-")
    return f" {written}" if value is True else f' {written}="{html.escape(str(value), quote=True)}"'
