"""The README names every option with its default, and its examples are Python."""

from __future__ import annotations

import inspect
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import shardwise as sw
from shardwise.materialization.cpu_storage import CPU_STORAGE
from shardwise.strategies.base import Strategy
from shardwise.strategies.fsdp_config import FSDPConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", README, flags=re.MULTILINE))
# Left out: the model's class and name, which are no options, and what both strategies do not share.
NO_ROWS = {"self", "model_cls", "pretrained_model_name_or_path", "config_kwargs", "accelerator", "ddp_config"}
IN_WORDS = {"sharding_strategy", "backward_prefetch", "cpu_ram_efficient_loading"}


def options_of(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in NO_ROWS}


@pytest.mark.parametrize(
    "function", [sw.NativeFSDPStrategy.__init__, sw.AccelerateStrategy.__init__, Strategy.load_pretrained]
)
def test_every_option_has_a_row_with_its_default(function: Any) -> None:
    for name, default in options_of(function).items():
        written = f"`{default!r}`".replace("'", '"')
        assert ROWS[name].startswith(written), name


def test_every_way_to_keep_shards_of_cpu_ranks_is_named() -> None:
    (row,) = [line for line in README.splitlines() if line.startswith("| `cpu_storage` |")]
    assert all(f'`"{way}"`' in row.split("|")[3] for way in CPU_STORAGE)


def test_the_extra_of_the_facade_s_default_strategy_is_named() -> None:
    default = inspect.signature(sw.TransformersModel).parameters["strategy"].default
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{default}` |")]
    assert "`TransformersModel`" in row


def test_every_key_of_fsdp_config_is_named() -> None:
    for field in fields(FSDPConfig):
        assert field.name in ROWS or (field.name in IN_WORDS and f"`{field.name}`" in README), field.name


def test_the_examples_are_python() -> None:
    examples = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert len(examples) >= 6
    for example in examples:
        compile(example, "README.md", "exec")


def test_what_it_names_is_in_the_source_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    named = {name for name in re.findall(r"`(?:python )?(\w+)/", README) if (ROOT / name).is_dir()}
    assert named >= {"benchmarks", "docs", "examples", "recipes"}
    assert named <= set(included)
