"""A module's own code for `load_state_dict` is not called, and that is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import shardwise as sw


class Flipping(nn.Linear):
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].flip(0)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def test_a_module_that_changes_values_while_it_loads_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), Flipping(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[2].register_load_state_dict_pre_hook(lambda *_: None)
    sw.materialize(model, model.state_dict())
    (text,) = [message for message in caplog.messages if "_load_from_state_dict" in message]
    assert "hooks of 1, 2 are not called" in text


def test_what_torch_brings_is_not(caplog: pytest.LogCaptureFixture) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(nn.BatchNorm1d(2), checkpoint_wrapper(nn.Linear(2, 2)), nn.LSTM(2, 2))
    values = {
        name.replace("_checkpoint_wrapped_module.", ""): torch.ones_like(v)
        for name, v in model.state_dict().items()
    }
    sw.materialize(model, values)
    assert not [message for message in caplog.messages if "_load_from_state_dict" in message]
