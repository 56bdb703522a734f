"""The documentation: both languages have all pages, blocks and options, and what it quotes is what the source says."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
import typer
import yaml

import shardwise as sw
from shardwise.cli import app
from shardwise.strategies.base import Strategy
from shardwise.strategies.fsdp_config import FSDPConfig
from tests.documents import (
    DOCS,
    NOT_TRANSLATED,
    PAGES,
    REPOSITORY,
    anchors,
    blocks,
    page,
    rows,
    section,
)

LANGUAGES = ("en", "zh")
TRANSLATED = tuple(name for name in PAGES if name not in NOT_TRANSLATED)
by_language = pytest.mark.parametrize("language", LANGUAGES)
NO_OPTIONS = {"self", "model", "model_cls", "pretrained_model_name_or_path", "config_kwargs"}
SECTIONS = {
    "both": sw.NativeFSDPStrategy.__init__,
    "load_pretrained": Strategy.load_pretrained,
    "materialize": sw.materialize,
    "facade": sw.TransformersModel.__init__,
}


# --- two languages ---


def test_every_page_has_its_counterpart_and_a_place_in_the_navigation() -> None:
    chinese = {path.name.removesuffix(".zh.md") for path in DOCS.glob("*.zh.md")}
    assert chinese == set(PAGES)
    site = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    placed = {next(iter(entry.values())).removesuffix(".md") for entry in site["nav"]}
    assert placed == set(PAGES)
    i18n = next(plugin["i18n"] for plugin in site["plugins"] if "i18n" in plugin)
    translated = i18n["languages"][1]["nav_translations"]
    assert set(translated) == {next(iter(entry)) for entry in site["nav"]}


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_languages_have_the_same_blocks_headings_and_tables(name: str) -> None:
    english, chinese = page(name, "en"), page(name, "zh")
    assert blocks(english) == blocks(chinese)
    assert anchors(english) == anchors(chinese)
    assert len(re.findall(r"^\|", english, flags=re.MULTILINE)) == len(
        re.findall(r"^\|", chinese, flags=re.MULTILINE)
    )
    assert list(rows(english)) == list(rows(chinese))


def test_the_chinese_pages_are_chinese() -> None:
    for name in TRANSLATED:
        prose = re.sub(r"```.*?```|`[^`]*`|^:::.*?$", "", page(name, "zh"), flags=re.MULTILINE | re.DOTALL)
        sentences = [
            line for line in prose.splitlines() if re.search(r"[a-z]{3,} [a-z]{2,} [a-z]{2,} [a-z]{2,}", line)
        ]
        assert not sentences, f"{name}: {sentences[:3]}"


# --- options ---


@by_language
@pytest.mark.parametrize("anchor", SECTIONS)
def test_every_option_is_described_with_its_default(anchor: str, language: str) -> None:
    described = rows(section(page("strategies", language), anchor))
    parameters = inspect.signature(SECTIONS[anchor]).parameters.items()
    for name, parameter in parameters:
        if name in NO_OPTIONS and not (anchor == "facade" and name == "model_cls"):
            continue
        written = "" if parameter.default is parameter.empty else f"`{parameter.default!r}`".replace("'", '"')
        assert described[name][0] == written, name
        assert described[name][1], f"{name}: what does it mean?"
    assert set(described) <= {name for name, _ in parameters} | {
        "accelerator",
        "ddp_config",
    }, "an option that there is not"


@by_language
def test_every_option_of_accelerate_is_described(language: str) -> None:
    described = rows(section(page("strategies", language), "both"))
    for name, parameter in inspect.signature(sw.AccelerateStrategy.__init__).parameters.items():
        if name != "self":
            assert described[name][0] == f"`{parameter.default!r}`".replace("'", '"'), name


@by_language
def test_every_key_of_fsdp_config_is_described(language: str) -> None:
    described = rows(section(page("strategies", language), "fsdp_config"))
    assert set(described) == {field.name for field in fields(FSDPConfig)}
    for field in fields(FSDPConfig):
        assert described[field.name][0] == f"`{field.default!r}`".replace("'", '"'), field.name


@by_language
def test_every_argument_of_an_export_is_described(language: str) -> None:
    described = rows(section(page("training", language), "export"))
    of_all = {"staging_bytes", "group", "timeout"}  # as of materialize
    for name, parameter in inspect.signature(sw.export_checkpoint).parameters.items():
        if name not in {"model", "directory", *of_all}:
            assert described[name][0] == f"`{parameter.default!r}`".replace("'", '"'), name


@cache
def command(name: str) -> Any:
    """Return a command; for what is an option, the command line itself."""
    found = typer.main.get_command(app)
    return found if name.startswith("--") else found.commands[name]  # type: ignore[attr-defined]


def option_names(name: str) -> set[str]:
    return {
        word
        for each in command(name).params
        for word in (*each.opts, *each.secondary_opts)
        if word[:2] == "--"
    }


@by_language
@pytest.mark.parametrize(("name", "described_on"), [("train", "training"), ("plan", "commands")])
def test_every_option_of_a_command_is_described_with_its_default(
    name: str, described_on: str, language: str
) -> None:
    described = rows(section(page(described_on, language), name))
    assert set(described) == option_names(name) - {"--help"}
    for each in command(name).params:
        if each.default not in (None, False, True) and not each.required and each.param_type_name == "option":
            assert described[each.opts[0]][0] == f"`{each.default}`", each.opts[0]


# --- what is quoted ---


def test_every_public_name_is_in_the_reference_of_both_languages() -> None:
    for language in LANGUAGES:
        found = re.findall(r"^::: ([\w.]+)$", page("api", language), flags=re.MULTILINE)
        assert {name.rpartition(".")[2] for name in found} == {*sw.__all__, "errors"}


@by_language
def test_python_blocks_compile(language: str) -> None:
    for name in PAGES:
        for number, block in enumerate(blocks(page(name, language))):
            if block.language == "python":
                compile(block.code, f"{name}, block {number}", "exec")


def command_lines() -> Iterator[tuple[str, list[str]]]:
    for name in TRANSLATED:
        for block in blocks(page(name, "en")):
            if block.language == "sh":
                yield from ((name, shlex.split(line)) for line in block.code.splitlines() if line)


def test_command_lines_have_options_that_there_are() -> None:
    checked = 0
    for name, words in command_lines():
        if "shardwise" in words[:5] and words[0] != "pip":
            called = words[words.index("shardwise") + 1 :]
            given = {word for word in called if word.startswith("--")}
            assert given <= option_names(called[0]), f"{name}: {words}"
            checked += 1
    assert checked >= 8


def test_files_that_are_named_are_there() -> None:
    for name in TRANSLATED:
        for language in LANGUAGES:
            text = page(name, language)
            for path in re.findall(r"(?:examples|recipes)/[\w.]+\w", text):
                assert (REPOSITORY / path).is_file(), f"{name}: {path}"


@by_language
def test_what_benchmarks_wrote_is_there_and_small_and_of_no_machine(language: str) -> None:
    text = page("measured", language)
    pictures, tables = (
        re.findall(r"^!\[.+\]\((.+)\)$", text, flags=re.MULTILINE),
        re.findall(r'^--8<-- "(.+)"$', text, flags=re.MULTILINE),
    )
    assert len(pictures) >= 3
    assert len(tables) >= 3
    for name in pictures:
        assert 1_000 < (DOCS / name).stat().st_size < 250_000, name
    for name in tables:
        written = (DOCS / name).read_text(encoding="utf-8") + (DOCS / name).with_suffix(".json").read_text()
        assert "| `native-efficient` |" in written, name
        assert not re.search(r'[" (]/(tmp|home|root|work|Users)/', written), name


def source_texts() -> list[str]:
    """Return every text of the package's source, with `…` where a value is put in."""
    found = []
    for path in (REPOSITORY / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[ds]|%r|%g", "…", node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = (each.value if isinstance(each, ast.Constant) else "…" for each in node.values)
                found.append("".join(map(str, parts)))
    return found


def test_quoted_messages_are_those_of_the_source() -> None:
    texts = source_texts()
    quoted = [
        (name, line)
        for name in TRANSLATED
        for block in blocks(page(name, "en"))
        if block.language == "text"
        for line in block.code.splitlines()
    ]
    assert len(quoted) >= 25
    for name, line in quoted:
        assert any(line in text for text in texts), f"{name}: {line}"


@by_language
def test_the_releases_of_transformers_are_those_that_tests_run_on(language: str) -> None:
    said = section(page("strategies", language), "memory_efficient_init")
    for pins in ("tf4", "tf5"):
        text = (REPOSITORY / "constraints" / f"{pins}.txt").read_text()
        (release,) = re.findall(r"^transformers==(.+)$", text, flags=re.MULTILINE)
        assert f"| {release} |" in said, release
