"""A file fails on one of several ranks: all raise that rank's error, and a retry in the same processes works.

Each rank reads a copy of the checkpoint that it has to itself, as nodes without a shared file system do.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.errors import ChangedFileError, CheckpointError
from shardwise.testing import RankPool
from tests.distributed.steps import every_rank

pytestmark = pytest.mark.distributed

LAYERS, SMALL = 2, 70
STAGING_BYTES = 64 * 1024  # so that every rank reads a part of what is exchanged
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def net(*, device: str = "meta") -> nn.Module:
    """Large tensors that their owners read, and many small ones that are exchanged."""
    with torch.device(device):
        model = nn.Module()
        model.large = nn.ModuleList(nn.Linear(512, 1024, bias=False) for _ in range(LAYERS))
        model.small = nn.ModuleList(nn.Linear(64, 6, bias=False) for _ in range(SMALL))
    return model


@pytest.fixture
def copies(tmp_path: Path) -> str:
    """A folder per rank, each with the same two files: sizes, contents and times."""
    torch.manual_seed(0)
    values = {name: torch.randn_like(value) for name, value in net(device="cpu").state_dict().items()}
    original = tmp_path / "original"
    original.mkdir()
    save_file({name: value for name, value in values.items() if "large" in name}, original / ONE)
    save_file({name: value for name, value in values.items() if "small" in name}, original / TWO)
    for rank in range(3):
        shutil.copytree(original, tmp_path / str(rank))
    return str(tmp_path)


def disk_error(path: Path) -> None:
    raise OSError(5, "Input/output error")


def truncate(path: Path) -> None:
    os.truncate(path, 1000)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def replace(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


DAMAGES: dict[str, tuple[Callable[[Path], None], type[CheckpointError], str]] = {
    "disk error": (disk_error, CheckpointError, "failed: EIO"),
    "truncated": (truncate, ChangedFileError, "the file has become shorter since its header was read"),
    "written to": (touch, ChangedFileError, "to stay as it was during the load"),
    "replaced": (replace, ChangedFileError, "to stay as it was during the load"),
}


@pytest.mark.parametrize(
    ("failing", "file"),
    [(0, ONE), (1, ONE), (2, TWO)],
    ids=["the first rank", "another rank", "before an exchange"],
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_rank_raises_the_first_error_and_a_retry_works(
    pool: RankPool, copies: str, damage: str, failing: int, file: str
) -> None:
    _, kind, text = DAMAGES[damage]
    for rank, error in enumerate(pool.run(fail_and_retry, copies, damage, failing, file, ranks=3)):
        assert type(error) is (kind if rank == failing else sw.PeerError), error
        assert f"{failing}/{file}" in str(error)
        assert text in str(error)
        assert rank == failing or f"phase 'read': rank {failing} on " in str(error)


def fail_and_retry(folder: str, damage: str, failing: int, file: str) -> Any:
    """Return this rank's error of the first attempt; the second one, into the same model, must succeed."""
    directory = Path(folder) / str(dist.get_rank())
    model = net()
    fully_shard(model)
    done = []
    real = os.preadv

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path == directory / file and offset >= first_value(path) and not done:
            done.append(path) if damage != "disk error" else None
            DAMAGES[damage][0](path)
        return real(fd, buffers, offset)

    hurt = mock.patch.object(os, "preadv", preadv if dist.get_rank() == failing else real)
    with hurt, pytest.raises(sw.ShardwiseError) as caught:
        sw.materialize(model, directory, cpu_storage="copy", staging_bytes=STAGING_BYTES, timeout=60)
    every_rank(None)
    for name in (ONE, TWO):
        (directory / name).unlink()
        shutil.copy2(Path(folder) / "original" / name, directory / name)
    sw.materialize(model, directory, cpu_storage="copy", staging_bytes=STAGING_BYTES, timeout=60)
    expected = load_file(directory / ONE) | load_file(directory / TWO)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), expected[name]), name
    return caught.value


def first_value(path: Path) -> int:
    """Return where the header ends, in bytes."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
