"""Stages of a pipeline: each fills its own part of the model from the one checkpoint, in a call of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.errors import RankMismatchError
from shardwise.testing import RankPool
from tests.distributed.layouts import EVEN, Layer, mesh_of, token_ids, tower, write_tower
from tests.distributed.models import from_checkpoint, raw_bytes, transformers_fuses_experts
from tests.distributed.steps import Checkpoint

pytestmark = pytest.mark.distributed

TIMEOUT_SECONDS = 60.0


class Stage(nn.Module):
    """One layer of a tower under the name that it has there, and the embedding or the head."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 12) if index == 0 else None
        self.layers = nn.ModuleDict({str(index): Layer(EVEN)})
        self.head = nn.Linear(12, 13, bias=False) if index == 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) if self.embed is not None else x
        for layer in self.layers.values():
            x = layer(x)
        return self.head(x) if self.head is not None else x


def stage_on_meta(index: int, mesh: DeviceMesh) -> Stage:
    with torch.device("meta"):
        stage = Stage(index)
    for layer in stage.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(stage, mesh=mesh)
    return stage


@contextmanager
def log_of_shardwise() -> Iterator[list[tuple[int, str]]]:
    """Collect (level, message) of what shardwise logs while the body runs."""
    lines: list[tuple[int, str]] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append((record.levelno, record.getMessage()))
    logger = logging.getLogger("shardwise")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("stages")
    return write_tower(path, EVEN)


@pytest.mark.parametrize("route", ["auto", "striped", "rank0"])
def test_two_stages_of_two_shards(pool: RankPool, file: str, route: str) -> None:
    requested = pool.run(fill_stage, file, route, ranks=4)
    own = [sum(parameter.nbytes for parameter in Stage(index).parameters()) for index in (0, 1)]
    for rank, nbytes in enumerate(requested):
        assert own[rank // 2] <= nbytes <= 1.02 * own[rank // 2]  # the other stage's bytes are not read


def fill_stage(file: str, route: str) -> int:
    """Fill a stage and run the pipeline; return the bytes that the stage's ranks requested."""
    mesh = mesh_of(pp=2, dp_shard=2)
    index = mesh["pp"].get_local_rank()
    stage = stage_on_meta(index, mesh["dp_shard"])
    group = mesh["dp_shard"].get_group()
    with log_of_shardwise() as lines:
        report = sw.materialize(
            stage, file, route=route, group=group, cpu_storage="copy", timeout=TIMEOUT_SECONDS
        )
    unexpected = [level for level, line in lines if "does not take" in line]
    assert unexpected == ([logging.INFO] if dist.get_rank() % 2 == 0 else [])
    assert len(report.ranks) == 2
    assert sw.verify_shards(stage, file, group=group, timeout=TIMEOUT_SECONDS).is_equal
    pipe, shape = mesh["pp"].get_group(), (*token_ids().shape, 12)
    with torch.no_grad():
        if index == 0:
            dist.send(stage(token_ids()), group=pipe, group_dst=1)
        else:
            hidden = torch.empty(shape)
            dist.recv(hidden, group=pipe, group_src=0)
            torch.testing.assert_close(stage(hidden), tower(EVEN)(token_ids()))
    return report.storage_bytes


def test_all_ranks_at_once_still_warn_of_what_the_model_does_not_take(pool: RankPool, file: str) -> None:
    assert pool.run(warnings_of_all, file, ranks=2) == [1, 0]


def warnings_of_all(file: str) -> int:
    stage = stage_on_meta(0, mesh_of(dp_shard=2))
    with log_of_shardwise() as lines:
        sw.materialize(stage, file, timeout=TIMEOUT_SECONDS)
    return sum(level == logging.WARNING and "does not take" in line for level, line in lines)


def test_stages_in_one_call_are_told_of_group(pool: RankPool, file: str) -> None:
    errors = pool.run_to_errors(fill_stages_together, file, ranks=4)
    assert all(isinstance(error, RankMismatchError) for error in errors)
    assert all("pass the ranks of a stage as group=" in str(error) for error in errors)


def fill_stages_together(file: str) -> None:
    mesh = mesh_of(pp=2, dp_shard=2)
    stage = stage_on_meta(mesh["pp"].get_local_rank(), mesh["dp_shard"])
    sw.materialize(stage, file, timeout=TIMEOUT_SECONDS)


# --- stages of a transformers model, whose experts are stored apart ---


@pytest.mark.parametrize("kind", ["qwen3_untied", "qwen3_moe"])
def test_stages_of_a_transformers_model(pool: RankPool, checkpoint: Checkpoint, kind: str) -> None:
    pool.run(fill_transformers_stage, checkpoint(kind), ranks=4)


def fill_transformers_stage(directory: str) -> None:
    """Take the other stage's modules out of a model, as pipelines by hand do, and fill what is left."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    mesh = mesh_of(pp=2, dp_shard=2)
    index = mesh["pp"].get_local_rank()
    with init_empty_weights(include_buffers=False):
        config = AutoConfig.from_pretrained(directory)
        model = AutoModelForCausalLM.from_config(config, **transformers_dtype())
    model.model.layers = nn.ModuleDict({str(index): model.model.layers[index]})
    if index == 0:
        model.model.norm, model.lm_head = nn.Identity(), nn.Identity()
    else:
        model.model.embed_tokens = nn.Identity()
    for layer in model.model.layers.values():
        fully_shard(layer, mesh=mesh["dp_shard"])
    fully_shard(model, mesh=mesh["dp_shard"])
    group = mesh["dp_shard"].get_group()
    report = sw.materialize(model, directory, group=group, cpu_storage="copy", timeout=TIMEOUT_SECONDS)
    expected = from_checkpoint(directory).state_dict()
    for name, parameter in model.named_parameters():
        assert torch.equal(raw_bytes(parameter.full_tensor()), raw_bytes(expected[name])), name
    own = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert own <= report.storage_bytes <= 1.02 * own


def transformers_dtype() -> dict[str, torch.dtype]:
    """Return the argument that builds a model in bfloat16."""
    return {"dtype" if transformers_fuses_experts() else "torch_dtype": torch.bfloat16}


@pytest.mark.skipif(
    not transformers_fuses_experts(), reason="transformers 4.57 has no DistributedConfig with pp_size"
)
def test_stages_that_transformers_laid_out(pool: RankPool, checkpoint: Checkpoint) -> None:
    pool.run(fill_distributed_stage, checkpoint("qwen3_untied"), ranks=2)


def fill_distributed_stage(directory: str) -> None:
    """Each rank is a stage: the logits that transformers' own pipeline computes are a single process's."""
    from tests.distributed.test_distributed_config import laid_out

    model = laid_out(directory, {"pp_size": 2}, dtype=torch.float32)
    own = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    sw.materialize(model, directory, group=own, timeout=TIMEOUT_SECONDS)
    ids = torch.arange(16).view(2, 8)
    with torch.no_grad():
        expected = from_checkpoint(directory, dtype=torch.float32)(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
