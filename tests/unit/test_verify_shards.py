"""`verify_shards` says that all is equal only where it has compared something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shardwise as sw


def test_a_checkpoint_without_any_of_the_names_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    file = tmp_path / "a.safetensors"
    save_file({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, file)
    with pytest.raises(sw.CheckpointError) as caught:
        sw.verify_shards(model, file)
    assert "weight, bias, got module.bias, module.weight" in str(caught.value)
    assert "rename=" in str(caught.value)
    report = sw.verify_shards(model, file, rename=lambda name: f"module.{name}")
    assert report.is_equal
    assert report.tensors == 2


def test_what_the_checkpoint_lacks_in_part_is_named(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    file = tmp_path / "a.safetensors"
    save_file({"weight": model.weight.detach()}, file)
    report = sw.verify_shards(model, file)
    assert (report.tensors, report.absent) == (1, ("bias",))


def test_a_model_on_meta_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, file)
    with pytest.raises(sw.LeftOnMetaError, match=r"weight, bias on meta.*wrap_model or materialize"):
        sw.verify_shards(nn.Linear(3, 2, device="meta"), file)
