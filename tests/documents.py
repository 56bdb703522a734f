"""The pages of the documentation as data: blocks, tables and headings, for the tests that check and run them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
# Their text is for contributors, or made by a command; the Chinese page introduces it.
NOT_TRANSLATED = ("design", "faults")
PAGES = tuple(sorted(path.stem for path in DOCS.glob("*.md") if not path.stem.endswith(".zh")))

_BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of code.

    Args:
        language: As the page names it: `python`, `sh`, `diff`, `text`.
        title: Of the block; empty where it has none.
        code: Its lines.
    """

    language: str
    title: str
    code: str


def page(name: str, language: str) -> str:
    """Return a page's text.

    Args:
        name: Without language and ending.
        language: `en` or `zh`.
    """
    return (DOCS / f"{name}{'' if language == 'en' else '.' + language}.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    """Return the blocks of code of a page in their order."""
    found = []
    for language, words, code in _BLOCK.findall(text):
        title = re.search(r'title="(.*?)"', words)
        found.append(Block(language=language, title=title[1] if title else "", code=code))
    return found


def anchors(text: str) -> list[str]:
    """Return the names that a page gives its headings, in their order."""
    return re.findall(r"^#{2,} .+ \{ #([\w-]+) \}$", text, flags=re.MULTILINE)


def section(text: str, anchor: str) -> str:
    """Return the part of a page under a heading, up to the next one that has a name."""
    (_, after) = text.split(f"{{ #{anchor} }}\n", 1)
    return re.split(r"^#{2,} .+ \{ #[\w-]+ \}$", after, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> dict[str, tuple[str, str]]:
    """Return what tables say of each name in code marks: the second column, and the rest. A row may begin with several names."""
    found: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        if line.startswith("|"):
            first, second, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            for name in re.findall(r"`([^`]+)`", first):
                found[name] = (second, " ".join(rest))
    return found
