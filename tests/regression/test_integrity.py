"""Checkpoints that are damaged or hostile, and downloads: what users saw, by number of the case."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.checkpoint import Location
from shardwise.materialization import downloading
from shardwise.materialization import open_source as open_source_function
from shardwise.testing import RankPool
from tests.distributed.models import check_equal, from_checkpoint
from tests.distributed.steps import STRATEGIES, Checkpoint, load, make_strategy

pytestmark = pytest.mark.distributed

INDEX = "model.safetensors.index.json"
NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def split(checkpoint: str, directory: Path) -> Path:
    """Copy a checkpoint of one file into one of two files and an index."""
    directory.mkdir()
    for file in Path(checkpoint).glob("*.json"):
        shutil.copy(file, directory)
    values = list(load_file(Path(checkpoint) / "model.safetensors").items())
    weight_map = {}
    for number, file in enumerate(NAMES):
        part = dict(values[number::2])
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def point_to(target: str) -> Callable[[Path], None]:
    """Return what moves the second file away and makes the index name another place for it."""

    def damage(directory: Path) -> None:
        outside = directory.parent / "outside.safetensors"
        (directory / NAMES[1]).rename(outside)
        index = (directory / INDEX).read_text().replace(NAMES[1], target.format(outside=outside))
        (directory / INDEX).write_text(index)

    return damage


def link_out(directory: Path) -> None:
    outside = directory.parent / "outside.safetensors"
    (directory / NAMES[1]).rename(outside)
    (directory / NAMES[1]).symlink_to(outside)


def remove(directory: Path) -> None:
    (directory / NAMES[1]).unlink()


def truncate(directory: Path) -> None:
    file = directory / NAMES[1]
    os.truncate(file, file.stat().st_size - 1)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def pickle(directory: Path) -> None:
    for file in (*NAMES, INDEX):
        (directory / file).unlink()
    torch.save({"lm_head.weight": Payload(str(directory.parent / "ran"))}, directory / "pytorch_model.bin")


DAMAGES = {
    "case 64: a file of the index is gone": (remove, NAMES[1]),
    "case 65: a file lacks its last byte": (truncate, NAMES[1]),
    "case 66: the index leads out by dots": (point_to("../outside.safetensors"), "../outside.safetensors"),
    "case 66: the index has an absolute path": (point_to("{outside}"), "outside.safetensors"),
    "case 66: a link leads out": (link_out, NAMES[1]),
    "case 67: a pickle file with code": (pickle, "pytorch_model.bin"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_cases_64_to_67_a_bad_directory_is_refused_on_all_ranks_before_anything_is_allocated(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, damage: str
) -> None:
    """Missing files gave garbage, truncated ones zeros; names in an index reached other files; pickles ran code."""
    change, named = DAMAGES[damage]
    directory = split(checkpoint("qwen3_untied"), tmp_path / "model")
    change(directory)
    pool.run(load_damaged, str(directory), named, ranks=2)
    assert not (tmp_path / "ran").exists()


def load_damaged(directory: str, named: str) -> None:
    model = nn.Linear(32, 97, bias=False, device="meta")
    fully_shard(model)
    with pytest.raises(sw.ShardwiseError) as caught:
        sw.materialize(model, directory, rename={"weight": "lm_head.weight"})
    check_refusal(caught.value, named)
    assert model.weight.is_meta
    for name in STRATEGIES:
        with pytest.raises(sw.ShardwiseError) as caught:
            load(make_strategy(name), directory, defer=True)
        check_refusal(caught.value, named)


def check_refusal(error: sw.ShardwiseError, named: str) -> None:
    kind = sw.CheckpointError if dist.get_rank() == 0 else sw.PeerError
    assert isinstance(error, kind), error
    assert named in str(error)


def test_the_directory_that_the_damages_start_from_loads(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    original = checkpoint("qwen3_untied")
    pool.run(load_undamaged, str(split(original, tmp_path / "model")), original, ranks=2)


def load_undamaged(directory: str, original: str) -> None:
    strategy = make_strategy("native_fsdp")
    check_equal(strategy.wrap_model(load(strategy, directory, defer=True)), from_checkpoint(original))


def test_case_69_one_rank_of_a_host_downloads(pool: RankPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Simultaneous downloads damaged the cache and were turned away by the hub."""
    pool.run(load_from_hub, checkpoint("qwen3_tied"), str(tmp_path), ranks=4)
    assert len((tmp_path / "downloads").read_text().splitlines()) == 1


def load_from_hub(original: str, folder: str) -> None:
    snapshot = Path(folder) / "snapshots" / "0123"

    def cached(location: Location, *, subfolder: str = "") -> Path | None:
        return snapshot if snapshot.is_dir() else None

    def download(location: Location, *, subfolder: str = "") -> Path:
        with (Path(folder) / "downloads").open("a") as log:
            log.write(f"{dist.get_rank()}\n")
        shutil.copytree(original, snapshot)
        return snapshot

    module: Any = sys.modules[open_source_function.__module__]
    originals = module.cached_snapshot, downloading.download_snapshot
    module.cached_snapshot, downloading.download_snapshot = cached, download
    try:
        strategy = make_strategy("native_fsdp")
        model = load(strategy, "org/name", defer=True)
    finally:
        module.cached_snapshot, downloading.download_snapshot = originals
    check_equal(strategy.wrap_model(model), from_checkpoint(original))
