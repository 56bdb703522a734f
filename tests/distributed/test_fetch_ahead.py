"""Files begin to come into the page cache while the model is built, where each of them will be read on this node, and only there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

import shardwise as sw
from shardwise.checkpoint import safetensors_source
from shardwise.testing import RankPool
from tests.distributed.steps import Checkpoint, load, make_strategy

pytestmark = pytest.mark.distributed

RANKS = 2
CASES: dict[str, dict[str, Any]] = {
    "one node": {},
    "two nodes": {},
    "one reader": {"route": "rank0"},
    "past the page cache": {"direct_io": True},
    "may go on from a state": {},
}


def test_who_fetches_what(pool: RankPool, checkpoint: Checkpoint) -> None:
    directory = checkpoint("qwen3_untied")
    names = sorted(path.name for path in Path(directory).glob("*.safetensors"))
    for rank, fetched in enumerate(pool.run(load_in_each_case, directory, ranks=RANKS)):
        assert fetched == {**{case: [] for case in CASES}, "one node": [(names, rank, RANKS)]}


def load_in_each_case(directory: str) -> dict[str, list[tuple[list[str], int, int]]]:
    """Return, for each case, the calls of `fetch_pages`: names of files, part and parts."""
    found = {}
    for case, options in CASES.items():
        calls: list[tuple[list[str], int, int]] = []

        def noted(files: Any, *, part: int, parts: int, calls: Any = calls) -> None:
            calls.append((sorted(path.name for path, _ in files), part, parts))

        node = {"GROUP_RANK": str(dist.get_rank())} if case == "two nodes" else {}
        with (
            mock.patch.object(safetensors_source, "fetch_pages", noted),
            mock.patch.dict(os.environ, node),
        ):
            if case == "may go on from a state":
                sw.TransformersModel(directory, strategy="native_fsdp", tokenizer=None)
            else:
                load(make_strategy("native_fsdp", **options), directory, defer=True)
        found[case] = calls
    return found
