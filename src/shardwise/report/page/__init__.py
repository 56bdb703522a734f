"""The report as one HTML page that needs nothing but a browser."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, Final

from shardwise.profiling.whole_file import write_whole
from shardwise.report.documents import Shown, read_documents
from shardwise.report.page import sections
from shardwise.report.page.markup import Markup, element
from shardwise.report.page.memory import memory
from shardwise.report.page.tensors import tensors

_NOTHING: Final = "data:,"


def save_page(documents: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write what was measured as one HTML page: it fetches nothing, and fits a phone and a dark screen.

    Args:
        documents: See `read_documents`.
        path: File to write; an existing one is replaced, missing directories are made.

    Raises:
        ConfigurationError: The documents cannot be read.
    """
    write_whole(path, page_of(read_documents(documents)))


def page_of(shown: Shown) -> str:
    """Return the page's text."""
    style, script = (
        files(__name__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The page may run its own script and nothing else, whatever a name in it holds.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href=_NOTHING),
        element("title", f"{shown.title} - shardwise"),
        element("style", Markup(style)),
    )
    parts = _sections(shown)
    contents = element(
        "nav",
        element("ul", *(element("li", element("a", title, href=f"#{name}")) for name, title, _ in parts)),
        aria_label="Parts of the report",
    )
    body = element(
        "body",
        element("a", "To the report", href="#report", class_="skip"),
        element("header", element("h1", shown.title), contents),
        element(
            "main",
            *(
                element("section", element("h2", title, id=name), content, aria_labelledby=name)
                for name, title, content in parts
            ),
            id="report",
            tabindex=-1,
        ),
        element(
            "footer",
            element("p", "Written by shardwise. The same figures are in the JSON document beside it."),
        ),
        element("script", Markup(script)),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _sections(shown: Shown) -> list[tuple[str, str, Markup]]:
    reports = [(run.mode, run.report) for run in shown.runs if run.report is not None]
    parts = [
        ("summary", "Summary", sections.summary(shown)),
        ("modes", "Modes", sections.modes(shown)),
        ("memory", "Memory over time", memory(shown.runs)),
    ]
    if reports:
        parts += [
            ("predicted", "Predicted and measured", sections.predicted(reports)),
            ("ranks", "Ranks", sections.ranks(shown, reports)),
            ("tensors", "Where each tensor came from", tensors(reports)),
            ("dtypes", "Dtypes", sections.dtypes(reports)),
        ]
    if shown.comparison is not None:
        parts.append(("environment", "Environment", sections.environment(shown.comparison)))
    return parts
