"""Buffers that were lost, cast or left as they lay in memory: what users saw, by number of the case."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.models import from_checkpoint, raw_bytes, same_bytes
from tests.distributed.steps import Checkpoint, by_strategy, load, make_strategy

pytestmark = pytest.mark.distributed


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Leave freed blocks full of NaN behind, in the sizes in which small tensors are allocated."""
    blocks = [
        torch.full((size,), float("nan"))
        for size in (2, 4, 8, 16, 32, 64, 256, 1024, 4096)
        for _ in range(64)
    ]
    del blocks
    yield


KINDS = ("qwen3_tied", "qwen3_moe")


@by_strategy
@pytest.mark.parametrize("way", ["direct", "load_pretrained", "pretrained_load_context"])
def test_case_16_17_18_buffers_are_equal_on_all_ranks_in_bytes_and_dtype(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, way: str
) -> None:
    """NaN on some ranks: rotary frequencies were cast, lost, or whatever memory held before."""
    directories = [checkpoint(kind) for kind in KINDS]
    digests = pool.run(digest_all, directories, strategy, way, ranks=3)
    assert all(digests[0])
    for other in digests[1:]:
        assert other == digests[0]


def digest_all(directories: list[str], name: str, way: str) -> list[dict[str, str]]:
    return [digest_buffers(directory, name, way) for directory in directories]


def digest_buffers(directory: str, name: str, way: str) -> dict[str, str]:
    strategy = make_strategy(name, cpu_storage="copy")
    with poisoned_memory():
        if way == "pretrained_load_context":
            with strategy.pretrained_load_context():
                model = from_checkpoint(directory)
        else:
            model = load(strategy, directory, defer=way == "direct")
        if dist.get_rank() != 0 and way != "direct":
            # As the failure had it: ranks without values cast what they do not have.
            for module in model.modules():
                for fqn, buffer in module._buffers.items():
                    if buffer is not None and buffer.is_floating_point():
                        module._buffers[fqn] = buffer.to("meta", torch.bfloat16)
        model = strategy.wrap_model(model)
    expected = dict(from_checkpoint(directory).named_buffers())
    found = dict(model.named_buffers())
    assert list(found) == list(expected)
    for fqn, buffer in found.items():
        assert same_bytes(buffer, expected[fqn]), fqn
    return {
        fqn: f"{buffer.dtype} {hashlib.sha256(raw_bytes(buffer).numpy()).hexdigest()}"
        for fqn, buffer in found.items()
    }


def test_buffers_that_each_rank_made_for_itself_are_refused(pool: RankPool, checkpoint: Checkpoint) -> None:
    """A deferred model's buffers with values were neither compared nor sent: each rank computed with its own."""
    for error in pool.run_to_errors(wrap_own_buffers, checkpoint("qwen3_tied"), ranks=2):
        assert isinstance(error, sw.RankError)
        assert "they differ in features" in str(error)


def wrap_own_buffers(directory: str) -> None:
    strategy = make_strategy("native_fsdp")
    model = load(strategy, directory, defer=True)
    model.register_buffer("features", torch.full((3,), float(dist.get_rank())), persistent=False)
    strategy.wrap_model(model)
