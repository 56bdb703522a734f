"""Names free of wrapper prefixes."""

from __future__ import annotations

import pytest

from shardwise.materialization import clean_fqn
from shardwise.materialization.names import checkpoint_name_of


@pytest.mark.parametrize(
    ("fqn", "expected"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("_orig_mod.model.weight", "model.weight"),
        ("layers.0._checkpoint_wrapped_module.mlp.weight", "layers.0.mlp.weight"),
        ("_orig_mod.layers.0._checkpoint_wrapped_module._orig_mod.weight", "layers.0.weight"),
        ("layers.0._checkpoint_wrapped_module", "layers.0"),
        ("_orig_mod", ""),
        ("", ""),
        ("layers.0.", "layers.0."),
        # A user's own module whose name ends like a wrapper's is no wrapper.
        ("my_orig_mod.weight", "my_orig_mod.weight"),
    ],
)
def test_clean_fqn(fqn: str, expected: str) -> None:
    assert clean_fqn(fqn) == expected


@pytest.mark.parametrize(
    ("fqn", "expected"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("base_model.model.q.base_layer.weight", "q.weight"),
        ("base_model.model.head.original_module.weight", "head.weight"),
        ("base_model.model.head.modules_to_save.default.weight", "head.weight"),
        ("base_model.model.head.modules_to_save.default.base_layer.weight", "head.weight"),
        ("head.modules_to_save.default.weight", "head.modules_to_save.default.weight"),
    ],
)
def test_checkpoint_name_of(fqn: str, expected: str) -> None:
    assert checkpoint_name_of(fqn) == expected
