"""A checkpoint of a transformers model that has very many small tensors: Qwen3 of hundreds of narrow layers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

TENSORS_PER_LAYER = 11
_HEADS, _HEAD_SIZE = 3, 64
_WIDTH = _HEADS * _HEAD_SIZE
_FILES = 4


def write_narrow_model(directory: Path, *, tensors: int) -> int:
    """Write the checkpoint in bf16, about 50 KB a tensor; return how many tensors it has."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=512,
        hidden_size=_WIDTH,
        intermediate_size=_WIDTH,
        num_hidden_layers=max(1, tensors // TENSORS_PER_LAYER),
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        head_dim=_HEAD_SIZE,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in transformers.Qwen3ForCausalLM(config).named_parameters()}
    names = list(shapes)
    weight_map = {}
    for number in range(_FILES):
        file = f"model-{number + 1:05d}-of-{_FILES:05d}.safetensors"
        part = names[number * len(names) // _FILES : (number + 1) * len(names) // _FILES]
        values = {name: torch.full(shapes[name], len(name) / 64, dtype=torch.bfloat16) for name in part}
        save_file(values, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)
    return len(names)
