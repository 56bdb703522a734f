"""Documents of a text file or of JSON lines; what is wrong in one is named with its file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shardwise.errors import DataError

_JSON_SUFFIXES: Final = (".jsonl", ".json", ".ndjson")
_MOST_CHARACTERS: Final = 1 << 20  # of a part of a text file, which is tokenised at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A document, or a part of one.

    Args:
        where: File and line at which it begins.
        text: Of a document; None of a conversation.
        messages: Of a conversation; None of a text.
        starts: Whether it begins a document.
        ends: Whether it ends one.
    """

    where: str
    text: str | None
    messages: list[dict[str, Any]] | None
    starts: bool
    ends: bool


def read_records(path: Path) -> Iterator[Record]:
    """Yield the documents of a file, in its order, without holding more than one.

    Args:
        path: With the suffix of JSON lines each line is an object with `text` or `messages`, and empty lines are skipped; any
            other file is one document of plain text, cut at line ends into parts of about a million characters.

    Raises:
        DataError: The file cannot be read; or a line is not UTF-8, not JSON, or neither a text nor a conversation.
    """
    try:
        yield from _json_lines(path) if path.suffix.lower() in _JSON_SUFFIXES else _text_parts(path)
    except OSError as error:
        raise DataError(f"{path}: expected a file of training data: {error}") from error


def _json_lines(path: Path) -> Iterator[Record]:
    for where, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: expected a JSON object, got {_shown(line)}: {error}") from error
        text = value.get("text") if isinstance(value, dict) else None
        messages = value.get("messages") if isinstance(value, dict) else None
        if isinstance(text, str) and messages is None:
            yield Record(where=where, text=text, messages=None, starts=True, ends=True)
        elif text is None and _is_conversation(messages):
            yield Record(where=where, text=None, messages=messages, starts=True, ends=True)
        else:
            raise DataError(
                f'{where}: expected {{"text": "..."}} or {{"messages": [{{"role": "...", "content": ...}}, ...]}}, got '
                f"{_shown(line)}"
            )


def _text_parts(path: Path) -> Iterator[Record]:
    lines: list[str] = []
    characters, begun, starts = 0, f"{path}:1", True
    for where, line in _lines(path):
        if characters >= _MOST_CHARACTERS:
            yield Record(where=begun, text="".join(lines), messages=None, starts=starts, ends=False)
            lines, characters, begun, starts = [], 0, where, False
        lines.append(line)
        characters += len(line)
    if lines:
        yield Record(where=begun, text="".join(lines), messages=None, starts=starts, ends=True)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}: expected UTF-8, got a byte that is not: {error}. Convert the file."
                ) from error


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in messages)
        # A template may make nothing of what is not there, and say nothing; a call of a tool needs no content.
        and all(each.get("content") is not None or each.get("tool_calls") for each in messages)
    )


def _shown(line: str) -> str:
    line = line.strip()
    return repr(line if len(line) <= 60 else line[:60] + "...")
