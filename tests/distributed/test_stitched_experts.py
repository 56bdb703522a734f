"""Stacked experts whose matrices lie apart on disk: pages of the files side by side, not copies."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import __version__ as version

import shardwise as sw
from shardwise.checkpoint import Run, SafetensorsSource
from shardwise.materialization import load
from shardwise.materialization.storage import local_of
from shardwise.testing import RankPool

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="pages are stitched on Linux"),
]
_EXPERTS, _SIZE = 8, 512  # a matrix of an expert is 512 KiB


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=_SIZE,
        intermediate_size=_SIZE,
        moe_intermediate_size=_SIZE,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_experts=_EXPERTS,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("moe")
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@contextmanager
def noting(*, refused: bool = False) -> Iterator[list[torch.Tensor]]:
    """Note what is stitched; or let nothing be, as where a process has no mapping left."""
    made: list[torch.Tensor] = []
    original = SafetensorsSource.stitched

    def stitched(self: SafetensorsSource, shards: Sequence[Sequence[Run]]) -> list[torch.Tensor | None]:
        found = [None] * len(shards) if refused else original(self, shards)
        made.extend(each for each in found if each is not None)
        return found

    SafetensorsSource.stitched = stitched  # type: ignore[method-assign]
    try:
        yield made
    finally:
        SafetensorsSource.stitched = original  # type: ignore[method-assign]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_experts_are_pages_of_the_file_and_train(pool: RankPool, moe: Path, ranks: int) -> None:
    files = {path: path.read_bytes() for path in moe.glob("*.safetensors")}
    pool.run(load_and_train, str(moe), ranks=ranks)
    assert {path: path.read_bytes() for path in files} == files


def load_and_train(path: str) -> None:
    from transformers import AutoModelForCausalLM

    ranks = dist.get_world_size()
    strategy = sw.NativeFSDPStrategy(mixed_precision="no")
    with noting() as made:
        model = strategy.wrap_model(strategy.load_pretrained(AutoModelForCausalLM, path))
    report = strategy.last_report
    assert report is not None
    matrices = 2 * 3 * _EXPERTS * _SIZE * _SIZE * 2  # bytes of both layers
    # transformers 4 keeps experts apart, as they are on disk: each is a mapping of its own.
    assert sum(each.nbytes for each in made) == (0 if version.startswith("4.") else matrices // ranks)
    assert report.storage_bytes == report.predicted["storage_bytes"]
    assert sw.verify_shards(model, path).is_equal
    stitched = {each.data_ptr() for each in made}
    before = {name: local_of(p).data_ptr() for name, p in model.named_parameters()}
    assert stitched <= set(before.values())
    optimizer = strategy.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    tokens = torch.arange(16).view(1, 16)
    losses = []
    for _ in range(2):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    assert {name: local_of(p).data_ptr() for name, p in model.named_parameters()} == before
    assert not sw.verify_shards(model, path).is_equal  # what was written is this process's own


def test_shards_beyond_the_mappings_of_a_process_are_read(pool: RankPool, moe: Path) -> None:
    if version.startswith("4."):
        pytest.skip("transformers 4 keeps experts apart, and stitches nothing")
    pool.run(load_with_few_mappings, str(moe), ranks=2)


def load_with_few_mappings(path: str) -> None:
    from transformers import AutoModelForCausalLM

    strategy = sw.NativeFSDPStrategy(mixed_precision="no")
    # A shard has a run for each of the 4 experts of a rank: those of one of the two layers.
    both_layers = 2 * 3 * (_EXPERTS // 2) * _SIZE * _SIZE * 2  # bytes on a rank
    with mock.patch.object(load, "_MOST_STITCHED_RUNS", _EXPERTS), noting() as made:
        model = strategy.wrap_model(strategy.load_pretrained(AutoModelForCausalLM, path))
    assert sum(each.nbytes for each in made) == both_layers // 2
    assert sw.verify_shards(model, path).is_equal


def test_they_are_read_where_pages_cannot_lie_side_by_side(pool: RankPool, moe: Path) -> None:
    pool.run(load_without, str(moe), ranks=2)


def load_without(path: str) -> None:
    from transformers import AutoModelForCausalLM

    strategy = sw.NativeFSDPStrategy(mixed_precision="no")
    with noting(refused=dist.get_rank() == 1):
        model = strategy.wrap_model(strategy.load_pretrained(AutoModelForCausalLM, path))
    assert sw.verify_shards(model, path).is_equal
