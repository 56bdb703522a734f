"""Tiny models and checkpoints, and what a sharded model is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.materialization import clean_fqn

VOCABULARY = 97  # prime: no number of ranks above 1 divides it
LAYERS = 2
CAUSAL_KINDS = ("qwen3_tied", "qwen3_untied", "qwen3_moe", "gpt2")


def transformers_fuses_experts() -> bool:
    """Whether the installed transformers keeps experts fused in the model and apart in the checkpoint."""
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


def write_checkpoint(kind: str, directory: Path) -> Path:
    """Save a random bf16 causal language model: one of `CAUSAL_KINDS`, or a larger one."""
    torch.manual_seed(1)
    model = causal_model(kind).to(torch.bfloat16)
    for parameter in model.parameters():  # norms are all ones otherwise, which hides permutations
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return directory


def causal_model(kind: str) -> nn.Module:
    """Return a new model of a kind that `write_checkpoint` knows, in float32."""
    import transformers

    attention = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if kind in ("qwen3_tied", "qwen3_untied"):
        return transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                **attention, intermediate_size=40, tie_word_embeddings=kind == "qwen3_tied"
            )
        )
    if kind == "qwen3_deep":  # many small tensors
        return transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                **{**attention, "num_hidden_layers": 20 * LAYERS},
                intermediate_size=40,
                tie_word_embeddings=False,
            )
        )
    if kind == "qwen3_wide":  # 16 MiB, nearly all of it one tensor
        return transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                **{**attention, "vocab_size": 262_144}, intermediate_size=40, tie_word_embeddings=True
            )
        )
    if kind == "qwen3_large":  # 38 million parameters, most of them in two tensors
        wide = {"vocab_size": 32_768, "hidden_size": 512, "head_dim": 64}
        return transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                **{**attention, **wide}, intermediate_size=1536, tie_word_embeddings=False
            )
        )
    if kind == "qwen3_moe":
        return transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                **attention,
                intermediate_size=40,
                moe_intermediate_size=16,
                num_experts=3,  # fewer than ranks
                num_experts_per_tok=2,
                tie_word_embeddings=False,
            )
        )
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=64,
                n_embd=32,
                n_layer=LAYERS,
                n_head=2,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=1,
            )
        )
    raise ValueError(f"expected one of {CAUSAL_KINDS}, got {kind!r}")


def from_checkpoint(directory: str, *, dtype: Any = "auto") -> nn.Module:
    """Load in this process alone, as a user without any strategy would."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


class Block(nn.Module):
    """A layer whose parameters have awkward sizes: 1, 3 and a prime."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 17)
        self.down = nn.Linear(17, width)
        self.gate = nn.Linear(width, 3)
        self.scale = nn.Parameter(torch.randn(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.gate(x).mean(-1, keepdim=True) * self.down(torch.tanh(self.up(x)))


class PlainNet(nn.Module):
    """Not from transformers: a list of layers, and buffers of every sort."""

    def __init__(self, width: int = 8, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Block(width) for _ in range(LAYERS))
        self.out = nn.Linear(width, 5, bias=False)
        self.register_buffer("mean", torch.randn(width))
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("frequencies", torch.rand(7, dtype=torch.float64), persistent=False)
        self.register_buffer("mask", torch.tensor([True, False, True]), persistent=False)
        # A plain attribute that is the very tensor of a buffer, as some rotary embeddings keep it.
        self.original_frequencies = self.frequencies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - self.mean
        for layer in self.layers:
            x = layer(x)
        return self.out(x) * self.frequencies.sum().to(x.dtype)


class TiedNet(nn.Module):
    """Not from transformers: an embedding tied to its head by plain assignment."""

    def __init__(self, width: int = 8, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(13, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(LAYERS))
        self.head = nn.Linear(width, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer under every one of its names, whole; all ranks call it together."""
    full: dict[int, torch.Tensor] = {}
    named: dict[str, torch.Tensor] = {}
    for fqn, tensor in named_tensors(model):
        if id(tensor) not in full:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            full[id(tensor)] = whole.detach().clone()  # on one rank the whole is the shard itself
        named[fqn] = full[id(tensor)]
    return named


def named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return parameters and buffers with every one of their names, in module order."""
    pairs = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return [(clean_fqn(fqn), tensor) for fqn, tensor in pairs]


def ties(model: nn.Module) -> set[frozenset[str]]:
    """Return the names of each tensor that has more than one."""
    names: dict[int, set[str]] = {}
    for fqn, tensor in named_tensors(model):
        names.setdefault(id(tensor), set()).add(fqn)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have one dtype, shape and content, bit by bit."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(raw_bytes(one), raw_bytes(other))
    )


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements as uint8."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def check_equal(model: nn.Module, expected: nn.Module) -> None:
    """Fail unless a sharded model is the expected one in every value, dtype, tie and flag; all ranks together."""
    left = [fqn for fqn, tensor in named_tensors(model) if tensor.is_meta]
    assert not left, f"left on meta: {left}"
    got = gathered(model)
    wanted = dict(named_tensors(expected))
    assert list(got) == list(wanted), f"names: {set(got) ^ set(wanted)}"
    for fqn, tensor in wanted.items():
        assert got[fqn].dtype == tensor.dtype, f"{fqn}: {got[fqn].dtype}, expected {tensor.dtype}"
        assert got[fqn].shape == tensor.shape, f"{fqn}: {got[fqn].shape}, expected {tensor.shape}"
        assert same_bytes(got[fqn], tensor), f"{fqn}: bytes differ"
    assert ties(model) == ties(expected)
    trainable = {fqn: p.requires_grad for fqn, p in expected.named_parameters()}
    assert {clean_fqn(fqn): p.requires_grad for fqn, p in model.named_parameters()} == trainable
    assert set(model.state_dict()) == set(expected.state_dict()) or "_checkpoint_wrapped_module" in str(model)
