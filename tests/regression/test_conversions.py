"""Conversions that were run on shards, or on whole models at once: what users saw, by number of the case."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import Shard

from shardwise.testing import RankPool
from tests.distributed.models import (
    LAYERS,
    causal_model,
    check_equal,
    from_checkpoint,
    gathered,
    transformers_fuses_experts,
)
from tests.distributed.steps import Checkpoint, load, make_strategy

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not transformers_fuses_experts(), reason="transformers 4 declares no conversions of tensors"
    ),
]


@pytest.fixture(scope="module")
def fused_checkpoint(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dense model stored with gate and up in one tensor."""
    directory = tmp_path_factory.mktemp("fused") / "model"
    shutil.copytree(checkpoint("qwen3_untied"), directory)
    tensors = load_file(directory / "model.safetensors")
    for layer in range(LAYERS):
        mlp = f"model.layers.{layer}.mlp."
        halves = [tensors.pop(f"{mlp}{half}_proj.weight") for half in ("gate", "up")]
        tensors[f"{mlp}gate_up.weight"] = torch.cat(halves)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


# FSDP2 shards other dims than 0 evenly alone; the model has 4 heads of queries and 2 of keys.
@pytest.mark.parametrize(("ranks", "dim"), [(1, 0), (2, 0), (3, 0), (4, 0), (2, 1), (4, 1)])
def test_case_12_13_14_15_chunks_and_permuted_heads_keep_their_rows(
    pool: RankPool, checkpoint: Checkpoint, fused_checkpoint: str, ranks: int, dim: int
) -> None:
    """Rows came out permuted: chunks were sharded before they were cut, and heads were permuted within a slice."""
    pool.run(load_converted, fused_checkpoint, checkpoint("qwen3_untied"), dim, ranks=ranks)


def load_converted(directory: str, stored_as_they_are: str, dim: int) -> None:
    plain = from_checkpoint(stored_as_they_are)
    with chunked_and_permuted():
        expected = from_checkpoint(directory)
        strategy = make_strategy(
            "native_fsdp", fsdp_config={"shard_placement_fn": lambda p: Shard(dim if p.ndim > dim else 0)}
        )
        model = strategy.wrap_model(load(strategy, directory, defer=True))
    whole = gathered(model)
    for half in ("gate", "up"):  # apart, so that halves in each other's place are seen
        name = f"model.layers.1.mlp.{half}_proj.weight"
        assert torch.equal(whole[name], plain.get_parameter(name))
    for projection in ("q", "k"):
        name = f"model.layers.1.self_attn.{projection}_proj.weight"
        assert not torch.equal(whole[name], plain.get_parameter(name))  # permuted
    check_equal(model, expected)
    assert strategy.last_report.converted == ()  # looked up in the files, and nothing went whole


@contextmanager
def chunked_and_permuted() -> Iterator[None]:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, PermuteForRope, WeightConverter

    assert conversion_mapping.get_checkpoint_conversion_mapping("qwen3") is None
    gate_and_up = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    mapping = [WeightConverter("mlp.gate_up.weight", gate_and_up, operations=[Chunk(dim=0)])]
    heads = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
    mapping += [WeightConverter(name, name, operations=[PermuteForRope()]) for name in heads]
    conversion_mapping.register_checkpoint_conversion_mapping("qwen3", mapping)
    try:
        yield
    finally:
        del conversion_mapping._checkpoint_conversion_mapping_cache["qwen3"]
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard("qwen3")


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_case_07_experts_that_straddle_files_are_fused_without_being_gathered(
    pool: RankPool, tmp_path: Path, ranks: int
) -> None:
    """All experts were fused, for the whole model, before anything was sharded."""
    torch.manual_seed(1)
    causal_model("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="3KB")
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    of_layer = {file for name, file in files.items() if name.startswith("model.layers.0.mlp.experts.")}
    assert len(of_layer) == 3
    stored_bytes = sum(
        tensor.nbytes for file in set(files.values()) for tensor in load_file(tmp_path / file).values()
    )
    requested = pool.run(load_experts, str(tmp_path), ranks=ranks)
    assert sum(requested) < 1.1 * stored_bytes  # of tensors this small the gaps between two parts count


def load_experts(directory: str) -> int:

    strategy = make_strategy("native_fsdp")
    model: Any = strategy.wrap_model(load(strategy, directory, defer=True))
    check_equal(model, from_checkpoint(directory))
    report = strategy.last_report
    assert report.converted == ()
    return int(report.ranks[dist.get_rank()].storage_bytes)
