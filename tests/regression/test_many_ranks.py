"""Numbers of ranks that nothing divides, and more of them than one machine usually gives a test: what users saw, by number of the case."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from shardwise.testing import RankPool
from tests.conftest import PRELOAD
from tests.distributed.models import check_equal, from_checkpoint
from tests.distributed.steps import Checkpoint, backward, language_loss, load, make_strategy, token_batch
from tests.regression.test_host_memory import MIB, measure_node
from tests.regression.test_host_memory import large_checkpoint as large_checkpoint

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def sixteen() -> Iterator[RankPool]:
    with RankPool(16, preload=PRELOAD) as pool:
        yield pool


@pytest.mark.parametrize(
    ("shape", "kind"), [((5,), "qwen3_moe"), ((7,), "qwen3_moe"), ((2, 4), "qwen3_tied")], ids=str
)
def test_case_14_33_ranks_beyond_heads_and_experts(
    sixteen: RankPool, checkpoint: Checkpoint, shape: tuple[int, ...], kind: str
) -> None:
    """A load came out permuted, or failed on some ranks, once there were more ranks than heads, or experts."""
    sixteen.run(load_on_mesh, checkpoint(kind), shape, ranks=math.prod(shape))


def load_on_mesh(directory: str, shape: tuple[int, ...]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "dp_shard")[-len(shape) :])
    strategy = make_strategy("native_fsdp", device_mesh=mesh)
    model = strategy.wrap_model(load(strategy, directory, defer=True, dtype=torch.float32))
    expected = from_checkpoint(directory, dtype=torch.float32)
    check_equal(model, expected)
    ids = token_batch()[:2]
    loss = language_loss(model, ids)
    torch.testing.assert_close(loss, language_loss(expected, ids), rtol=1e-4, atol=1e-5)
    backward(strategy, loss)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc for anonymous memory")
def test_case_04_sixteen_ranks_of_a_node_hold_the_model_once(
    sixteen: RankPool, checkpoint: Checkpoint, large_checkpoint: str
) -> None:
    """35B on 16 ranks used 2.2 TB."""
    sixteen.run(measure_node, checkpoint("qwen3_untied"), "copy", ranks=16)
    results = sixteen.run(measure_node, large_checkpoint, "copy", ranks=16)
    whole = results[0][1]
    # As with two and four ranks: what a rank needs besides does not grow with the model.
    assert sum(peak for peak, _ in results) <= whole + 16 * 8 * MIB < 4 * whole
