"""Names free of wrapper prefixes."""

from __future__ import annotations

import pytest

from shardwise.materialization import clean_fqn


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
