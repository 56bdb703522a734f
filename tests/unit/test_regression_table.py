"""The table of `tests/regression`: each test that it names is there, and each test of that folder has a row."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "regression" / "README.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
FAILURES, SCENARIOS = 71, 10


def rows() -> list[str]:
    """Return the rows that begin with a number."""
    return [line for line in TABLE.read_text().splitlines() if re.match(r"\| \d+ \|", line)]


@cache
def functions_of(path: str) -> frozenset[str]:
    """Return the names of a file's functions, without importing it."""
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_there_is_a_row_for_each_failure_and_each_scenario() -> None:
    numbers = [int(row.split("|")[1]) for row in rows()]
    assert numbers == [*range(1, FAILURES + 1), *range(1, SCENARIOS + 1)]
    assert all("https://github.com/" in row for row in rows()[:FAILURES])


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.split("|")[1].strip())
def test_each_test_that_a_row_names_is_there(row: str) -> None:
    found = NAMED.findall(row)
    assert found, "no test in this row"
    assert row.count("tests/") == len(found), "a test in this row is not written as `path::name`"
    for path, name in found:
        assert (ROOT / path).is_file(), path
        assert name in functions_of(path), f"{path}::{name}"
        assert name.startswith("test_") or path == "tests/cuda/checks.py", f"{path}::{name} is not a test"


def test_a_test_that_is_called_by_numbers_stands_in_their_rows() -> None:
    for file in sorted((ROOT / "tests" / "regression").glob("test_*.py")):
        path = str(file.relative_to(ROOT))
        for name in functions_of(path):
            called = re.match(r"test_cases?_([\d_]+)", name)
            numbers = [int(part) for part in called[1].split("_") if part] if called else []
            for number in numbers:
                assert f"`{path}::{name}`" in rows()[number - 1], f"row {number} lacks {path}::{name}"
