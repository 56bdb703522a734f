"""Imports inside the package point downwards only (docs/design.md, layers)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "shardwise"

# Bottom-up. Modules in one entry are siblings: they do not import each other, except as SIDEWAYS says.
# `__init__` is the public surface; the command line stands on it, and nothing but `testing` stands on that.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "tensors"),
    ("profiling",),
    ("checkpoint",),
    ("conversion",),
    ("plan",),
    ("materialization",),
    ("export",),
    ("strategies",),
    ("transformers_model", "training"),
    ("report", "compare"),
    ("planning",),
    ("__init__",),
    ("cli",),
    ("__main__",),
    ("testing",),
)
# (importer, imported) pairs of siblings.
SIDEWAYS = frozenset({("tensors", "errors"), ("compare", "report"), ("training", "transformers_model")})

LEVEL_OF = {name: level for level, names in enumerate(LAYERS) for name in names}


def layer_of(module: str, package: str) -> str:
    """Name of the layer that a dotted module belongs to; the package itself is `__init__`."""
    parts = module.split(".")
    assert parts[0] == package
    return parts[1] if len(parts) > 1 else "__init__"


def imported_modules(
    tree: ast.Module, module: str, is_package: bool, modules: set[str]
) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in a file, wherever it stands.

    `modules` holds every module of the package: `from a import b` imports the module `a.b` where there is one, and
    otherwise a name of `a`.
    """
    parent = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parent[: len(parent) - (node.level - 1)] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield node.lineno, submodule if submodule in modules else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            )
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                name = node.args[0].value
                level = len(name) - len(name.lstrip("."))
                above = parent[: len(parent) - (level - 1)] if level else []
                yield node.lineno, ".".join([*above, *([name[level:]] if name[level:] else [])])


def violations(package_folder: Path) -> list[str]:
    """One message per import that does not point downwards, and per module without a layer."""
    package = package_folder.name
    files: dict[str, Path] = {}  # dotted module -> file
    for file in sorted(package_folder.rglob("*.py")):
        parts = [package, *file.relative_to(package_folder).with_suffix("").parts]
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file

    found = []
    for module, file in files.items():
        where = file.relative_to(package_folder.parent)
        importer = layer_of(module, package)
        if importer not in LEVEL_OF:
            found.append(
                f"{where}: '{importer}' has no layer; place it in LAYERS of tests/unit/test_layers.py"
            )
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
        for line, imported_module in imported_modules(tree, module, file.name == "__init__.py", set(files)):
            if imported_module.split(".")[0] != package:
                continue
            imported = layer_of(imported_module, package)
            if imported not in LEVEL_OF:
                found.append(f"{where}:{line}: imports {imported_module}, which has no layer")
            elif importer != imported and not may_import(importer, imported):
                found.append(
                    f"{where}:{line}: '{importer}' imports {imported_module}; imports point downwards, and "
                    f"'{imported}' is not below '{importer}'"
                )
    return found


def may_import(importer: str, imported: str) -> bool:
    return LEVEL_OF[imported] < LEVEL_OF[importer] or (importer, imported) in SIDEWAYS


def test_imports_point_downwards() -> None:
    assert (PACKAGE / "errors.py").is_file()
    found = violations(PACKAGE)
    assert not found, "\n" + "\n".join(found)


def test_every_layer_has_one_place() -> None:
    names = [name for layer in LAYERS for name in layer]
    assert len(names) == len(set(names))
    for importer, imported in SIDEWAYS:
        assert LEVEL_OF[importer] == LEVEL_OF[imported]
        assert (imported, importer) not in SIDEWAYS


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A small package in good order, to be spoilt by a test."""
    folder = tmp_path / "shardwise"
    files = {
        "__init__.py": "from shardwise.errors import ShardwiseError\nfrom .strategies import native\n",
        "__main__.py": "from shardwise.cli import main\n",
        "errors.py": "import json\n",
        "tensors.py": "from .errors import ShardwiseError\n",
        "profiling/__init__.py": "from shardwise.profiling.sampler import Sampler\n",
        "profiling/sampler.py": "from .. import errors\n",
        "strategies/__init__.py": "",
        "strategies/native.py": "import shardwise.profiling.sampler as sampler\nfrom . import rules\n",
        "strategies/rules.py": "def late():\n    from ..errors import ShardwiseError\n",
        "report/__init__.py": "",
        "compare/__init__.py": "from shardwise import report\n",
        "cli/__init__.py": "import shardwise\n",
        "testing/__init__.py": "from shardwise.cli import main\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_package_in_order_passes(package: Path) -> None:
    assert violations(package) == []


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("errors.py", "import shardwise.strategies\n", 1),
        ("errors.py", "import shardwise\n", 1),
        ("errors.py", "from . import tensors\n", 1),
        ("errors.py", "from shardwise import strategies as s\n", 1),
        ("errors.py", "from shardwise import ShardwiseError\n", 1),
        ("errors.py", "from .strategies.native import x\n", 1),
        ("profiling/sampler.py", "from ..strategies import native\n", 1),
        ("profiling/sampler.py", "from ..errors import x\nfrom .. import report\n", 2),
        ("profiling/__init__.py", "from ..report import x\n", 1),
        ("profiling/sampler.py", "def f():\n    import shardwise.report\n", 2),
        (
            "profiling/sampler.py",
            "import typing\nif typing.TYPE_CHECKING:\n    from shardwise.report import x\n",
            3,
        ),
        ("profiling/sampler.py", "import importlib\nimportlib.import_module('shardwise.report')\n", 2),
        (
            "profiling/sampler.py",
            "from importlib import import_module\nimport_module('..report', __package__)\n",
            2,
        ),
        ("report/__init__.py", "from shardwise.compare import x\n", 1),
        ("__init__.py", "from shardwise.cli import main\n", 1),
        ("__init__.py", "from . import testing\n", 1),
        ("cli/__init__.py", "from shardwise.testing import x\n", 1),
        ("__main__.py", "from shardwise.testing import x\n", 1),
    ],
)
def test_an_import_that_points_upwards_is_found(package: Path, file: str, text: str, line: int) -> None:
    (package / file).write_text(text)
    found = violations(package)
    assert len(found) == 1, found
    assert found[0].startswith(f"shardwise/{file}:{line}: ")
    assert "imports point downwards" in found[0]


def test_a_module_without_a_layer_is_found(package: Path) -> None:
    (package / "helpers.py").write_text("")
    (package / "report" / "tables.py").write_text("from shardwise.helpers import x\n")
    assert violations(package) == [
        "shardwise/helpers.py: 'helpers' has no layer; place it in LAYERS of tests/unit/test_layers.py",
        "shardwise/report/tables.py:1: imports shardwise.helpers, which has no layer",
    ]
