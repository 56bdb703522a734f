"""Buffers that are made anew: every rotary variant equals the single-process one, whatever memory held before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.models import check_equal, from_checkpoint, raw_bytes, transformers_fuses_experts
from tests.distributed.steps import every_rank, load, make_strategy, own_rows, token_batch
from tests.regression.test_buffers import poisoned_memory

pytestmark = pytest.mark.distributed

THETA = {"rope_theta": 1e4}
SCALING: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
KINDS = (*SCALING, "per layer type", "router bias")


def write(kind: str, directory: Path) -> str:
    """Save a tiny model whose buffers are of a kind."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    torch.manual_seed(1)
    model: Any
    if kind == "per layer type":
        layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **layers))
    elif kind == "router bias":
        del sizes["head_dim"]
        experts = {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 16,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        }
        config = transformers.DeepseekV3Config(**{**sizes, **experts, "num_key_value_heads": 4})
        model = transformers.DeepseekV3ForCausalLM(config)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.normal_()
    else:
        name = "rope_parameters" if transformers_fuses_experts() else "rope_scaling"
        scaling = SCALING[kind] | (THETA if transformers_fuses_experts() else {})
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **{name: scaling}))
    model.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("defer", [True, False], ids=["deferred", "source"])
@pytest.mark.parametrize("kind", KINDS)
def test_buffers_equal_the_single_process_ones(
    pool: RankPool, tmp_path: Path, kind: str, defer: bool
) -> None:
    pool.run(compare_buffers, write(kind, tmp_path), kind, defer, ranks=2)


def compare_buffers(directory: str, kind: str, defer: bool) -> None:
    strategy = make_strategy("native_fsdp", cpu_storage="copy")
    with poisoned_memory():
        model: Any = strategy.wrap_model(load(strategy, directory, defer=defer))
    expected: Any = from_checkpoint(directory)
    buffers = dict(model.named_buffers())
    names = [fqn for fqn in buffers if ("correction_bias" if kind == "router bias" else "inv_freq") in fqn]
    assert len(names) >= (2 if kind == "per layer type" else 1)
    check_equal(model, expected)  # all on this device, in bytes and dtype
    own = {fqn: raw_bytes(buffer).tolist() for fqn, buffer in buffers.items()}
    assert all(other == own for other in every_rank(own))
    for module, other in zip(model.modules(), expected.modules(), strict=True):  # what is no buffer
        for name in ("attention_scaling", "original_max_seq_len", "max_seq_len_cached"):
            assert getattr(module, name, None) == getattr(other, name, None)
    for length in (12, 70):  # beyond what dynamic variants were made for, which change buffers
        ids = own_rows(token_batch(length=length))
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    check_equal(model, expected)


@pytest.mark.parametrize("kind", [*SCALING, "per layer type"])
def test_a_model_built_on_meta_gets_its_frequencies(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = write(kind, tmp_path)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    made_once = {"model.embed_tokens.embed_scale"} & set(dict(model.named_buffers()))
    expected: Any = from_checkpoint(directory)
    given = {} if transformers_fuses_experts() else {name: expected.get_buffer(name) for name in made_once}
    with poisoned_memory():
        report = sw.materialize(model.eval(), directory, buffers=given)
    names = [fqn for fqn, _ in model.named_buffers() if "inv_freq" in fqn]
    assert {report.origins[fqn] for fqn in names} == {"recomputed"}
    check_equal(model, expected)
