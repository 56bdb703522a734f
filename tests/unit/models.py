"""Small modules, and tiny transformers models on meta."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Rotary(nn.Module):
    """As transformers' rotary embeddings: a non-persistent buffer and an attribute that is the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.arange(4.0), persistent=False)
        self.original_inv_freq = self.inv_freq


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.rotary = Rotary()
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


class Layer(nn.Module):
    """A layer of a model that transformers does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Layered(nn.Module):
    """Layers in a module list, between modules that belong to no layer."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.after = nn.Linear(4, 4)


def tiny(kind: str, *, tied: bool = True) -> nn.Module:
    """Build a transformers model of two layers on meta: `qwen3`, `gpt2` or `t5`."""
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 32, "tie_word_embeddings": tied}
    with torch.device("meta"):
        if kind == "qwen3":
            config = transformers.Qwen3Config(
                **sizes,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
            )
            model = transformers.Qwen3ForCausalLM(config)
        elif kind == "gpt2":
            config = transformers.GPT2Config(**sizes, n_positions=16, n_embd=16, n_layer=2, n_head=2)
            model = transformers.GPT2LMHeadModel(config)
        elif kind == "t5":
            config = transformers.T5Config(**sizes, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
            model = transformers.T5ForConditionalGeneration(config)
        else:
            raise ValueError(f"expected qwen3, gpt2 or t5, got {kind!r}")
    model.tie_weights()
    return model
