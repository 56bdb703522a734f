"""`make bench` runs what `benchmarks/README.md` lists: every program, each with a file of figures and a floor."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def listed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # where a dataclass looks itself up
        spec.loader.exec_module(module)
    return module


def table_rows() -> list[list[str]]:
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[2:]  # below the heading


def test_every_program_is_run(listed: ModuleType) -> None:
    programs = {benchmark.command[0] for benchmark in listed.BENCHMARKS}
    assert programs == {path.name for path in FOLDER.glob("bench_*.py")} | {"gpu.py"}


def test_the_table_lists_what_is_run(listed: ModuleType) -> None:
    in_table = {name for row in table_rows() for name in re.findall(r"`([\w-]+\.json)`", row[3])}
    assert in_table == {benchmark.result for benchmark in listed.BENCHMARKS}
    programs = {name for row in table_rows() for name in re.findall(r"`(\w+\.py)", row[1])}
    assert programs == {benchmark.command[0] for benchmark in listed.BENCHMARKS}


def test_every_one_has_a_floor(listed: ModuleType) -> None:
    assert all(benchmark.floor for benchmark in listed.BENCHMARKS)
    assert all(row[2] for row in table_rows())


def test_every_program_writes_its_floor() -> None:
    for path in FOLDER.glob("bench_*.py"):
        text = path.read_text(encoding="utf-8")
        assert re.search(r"write_figures\([^)]*floor=", text, flags=re.DOTALL), path.name


def test_committed_figures_name_no_folder_of_a_machine() -> None:
    for path in (FOLDER / "results").glob("*.json"):
        assert not re.search(r'"/\w', path.read_text(encoding="utf-8")), path
