"""Functions of transformers that are not public and are used all the same: these fail when a release changes them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from shardwise.strategies.resized import _OF_MEANS
from shardwise.training.build import has_fused_kernels


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.layer_norm = nn.LayerNorm(4)


def test_the_trainer_s_decay_names_need_no_trainer() -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer

    assert list(inspect.signature(Trainer.get_decay_parameter_names).parameters) == ["self", "model"]
    assert Trainer.get_decay_parameter_names(None, Norms()) == ["linear.weight"]


def test_torch_names_the_devices_of_its_fused_optimizers() -> None:
    assert has_fused_kernels("cpu")
    assert has_fused_kernels("cuda")
    assert not has_fused_kernels("meta")


@pytest.mark.parametrize("name", _OF_MEANS)
def test_means_of_new_rows_are_made_by_methods_of_these_names(name: str) -> None:
    assert callable(getattr(PreTrainedModel, name))


def test_resizing_makes_means_by_those_methods_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipping them, as a rank without values does, leaves nothing that looks at old rows."""
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=16,
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=False,
        )
    )
    model.lm_head = nn.Linear(8, 16)  # with a bias
    called = []
    for name in _OF_MEANS:
        monkeypatch.setattr(model, name, lambda *_, name=name, **__: called.append(name), raising=True)
    embedding: Any = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight.fill_(1000.0)
        model.lm_head.weight.fill_(1000.0)
    model.resize_token_embeddings(24, mean_resizing=True)
    assert set(called) == set(_OF_MEANS)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert module.weight[:16].eq(1000.0).all()
        assert module.weight[16:].abs().max() < 100  # a mean would be near 1000
