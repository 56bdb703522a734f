"""Expressions that are compiled at their first use mean what they mean at once."""

from __future__ import annotations

import copy
import pickle
import re
from types import ModuleType

import pytest
import transformers

from shardwise.conversion.patterns import PatternOnUse, compiled_on_use


def test_it_searches_as_a_compiled_one() -> None:
    pattern = PatternOnUse(r"(?P<g0>layers\.(\d+))", re.IGNORECASE)

    found = pattern.search("model.LAYERS.7.weight")

    assert found is not None
    assert found.group(2) == "7"
    assert pattern.groupindex == {"g0": 1}
    assert pattern.pattern == r"(?P<g0>layers\.(\d+))"
    assert copy.deepcopy(pattern) is pattern
    assert pickle.loads(pickle.dumps(pattern)) == re.compile(pattern.pattern, re.IGNORECASE)


def test_a_wrong_expression_is_an_error_at_its_first_use() -> None:
    pattern = PatternOnUse("(")

    with pytest.raises(re.error):
        pattern.search("a")


def test_a_module_compiles_later_in_the_body_alone() -> None:
    module = ModuleType("compiles")
    module.re = re  # type: ignore[attr-defined]

    with compiled_on_use(module):
        assert isinstance(module.re.compile("a"), PatternOnUse)
        assert module.re.sub("a", "b", "aa") == "bb"
        with compiled_on_use(module):
            pass
        assert isinstance(module.re.compile("a"), PatternOnUse)

    assert module.re is re
    with compiled_on_use(ModuleType("has no re")):
        pass


@pytest.mark.skipif(transformers.__version__.startswith("4"), reason="transformers 4 has no such table")
def test_transformers_table_is_the_same_and_not_compiled() -> None:
    from transformers import conversion_mapping, core_model_loading

    compiled = conversion_mapping._build_checkpoint_conversion_mapping()
    with compiled_on_use(core_model_loading):
        later = conversion_mapping._build_checkpoint_conversion_mapping()

    def sources(mapping: dict[str, list[object]]) -> dict[str, list[tuple[object, ...]]]:
        return {kind: [entry.compiled_sources for entry in entries] for kind, entries in mapping.items()}

    found = sources(later)
    assert all(isinstance(pattern, PatternOnUse) for patterns in found.values() for pattern in patterns)
    assert {kind: [pattern.pattern for pattern in patterns] for kind, patterns in found.items()} == {
        kind: [pattern.pattern for pattern in patterns] for kind, patterns in sources(compiled).items()
    }
