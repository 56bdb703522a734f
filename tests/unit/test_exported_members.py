"""The public surface grows by decision: every name in it stands here."""

from __future__ import annotations

import re
import subprocess
import sys

import shardwise
from shardwise import errors

PUBLIC = [
    "AccelerateStrategy",
    "AlreadyWrappedError",
    "CallOrderError",
    "ChangedFileError",
    "CheckpointError",
    "CommandError",
    "ConfigurationError",
    "DamagedFileError",
    "DataError",
    "DivergedError",
    "ExportReport",
    "LeftOnMetaError",
    "LoadPlan",
    "LoadReport",
    "MemoryProfile",
    "Mismatch",
    "MissingDependencyError",
    "ModelError",
    "NativeFSDPStrategy",
    "OptimizerError",
    "OutOfMemoryError",
    "PeerError",
    "RankError",
    "RankExport",
    "RankMismatchError",
    "RankReport",
    "RankTimeoutError",
    "ShapeMismatchError",
    "ShardwiseError",
    "StalledReadError",
    "TransformersModel",
    "UnsupportedFormatError",
    "UnsupportedParameterError",
    "UnsupportedVersionError",
    "VerifyReport",
    "export_checkpoint",
    "fsdp_pretrained_load_context",
    "materialize",
    "phase",
    "plan_load",
    "profile_memory",
    "verify_shards",
]
OPTIONAL_PACKAGES = ["accelerate", "gguf", "matplotlib", "peft"]


def error_classes() -> dict[str, type]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }


def drawn_error_tree(text: str) -> dict[str, str | None]:
    """Class name -> parent's name, as drawn with box characters, four columns a level."""
    parents: dict[str, str | None] = {}
    path: list[str] = []  # from the root to the class drawn last
    for line in text.splitlines():
        drawn = re.match(r"    (?P<branches>(?:│   |    )*(?:├── |└── )?)(?P<name>[A-Z]\w+)", line)
        if drawn is None:
            continue
        depth = len(drawn["branches"]) // 4
        del path[depth:]
        parents[drawn["name"]] = path[-1] if path else None
        path.append(drawn["name"])
    return parents


def test_public_names_are_these() -> None:
    assert sorted(shardwise.__all__) == PUBLIC


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in shardwise.__all__:
        assert getattr(shardwise, name).__doc__, name


def test_every_error_is_public() -> None:
    for name, error in error_classes().items():
        assert issubclass(error, errors.ShardwiseError), name
        assert getattr(shardwise, name) is error


def test_drawn_error_tree_is_the_real_one() -> None:
    assert errors.__doc__ is not None
    # The first base is the parent in our tree; further ones are built-in exceptions.
    real = {name: error.__bases__[0].__name__ for name, error in error_classes().items()}
    assert drawn_error_tree(errors.__doc__) == real | {"ShardwiseError": None}


def test_drawn_error_tree_is_read_by_depth() -> None:
    drawn = """Words.

    Root
    ├── First            text
    │   └── Inner        text
    └── Second
        └── Last
    """
    assert drawn_error_tree(drawn) == {
        "Root": None,
        "First": "Root",
        "Inner": "First",
        "Second": "Root",
        "Last": "Second",
    }


def test_public_names_resolve_without_optional_packages() -> None:
    program = f"""
import sys
for name in {OPTIONAL_PACKAGES}:
    sys.modules[name] = None  # an import of it fails as if it were not installed
import shardwise
for name in shardwise.__all__:
    getattr(shardwise, name)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
