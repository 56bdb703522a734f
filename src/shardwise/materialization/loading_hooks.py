"""A module's own code for `load_state_dict`, which a load of regions cannot call: it wants whole tensors by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from shardwise.conversion import is_transformers_model
from shardwise.errors import listed
from shardwise.materialization.names import model_inside
from shardwise.materialization.walking import modules_by_prefix

_log = logging.getLogger("shardwise")

_KNOWN = ("torch", "transformers", "peft", "accelerate", "shardwise")  # whose hooks change no stored values


def warn_of_loading_hooks(model: nn.Module) -> None:
    """Say which modules have code that `load_state_dict` would call, and which may change values or names.

    Nothing of a transformers model, whose `from_pretrained` does not call it either.
    """
    if is_transformers_model(model_inside(model)):
        return
    found = [
        prefix[:-1] or type(model).__name__
        for prefix, module in modules_by_prefix(model)
        if any(_is_foreign(code) for code in _loading_code(module))
    ]
    if found:
        _log.warning(
            "materialize: values are taken as they are stored: _load_from_state_dict and load_state_dict hooks of %s are not "
            "called. If these change values, pass a state dict in the model's own form; if they change names, rename=.",
            listed(found),
        )


def _loading_code(module: nn.Module) -> Iterator[Any]:
    yield type(module)._load_from_state_dict
    for hook in module._load_state_dict_pre_hooks.values():
        yield getattr(hook, "hook", hook)


def _is_foreign(code: Any) -> bool:
    return str(getattr(code, "__module__", "")).partition(".")[0] not in _KNOWN
