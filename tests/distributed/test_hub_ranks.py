"""A hub id on several ranks: who downloads, who waits, and what all ranks hear of a download that fails."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
from huggingface_hub import constants
from safetensors.torch import save
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.checkpoint import hub
from shardwise.testing import RankPool
from tests.distributed.steps import every_rank
from tests.unit.hub_fakes import Cache, FakeHub

pytestmark = pytest.mark.distributed

DOWNLOAD_SECONDS = 0.5
SLOW_TIMEOUT_SECONDS, GROWTHS = 4.0, 5
WEIGHT = torch.arange(24.0).view(8, 3)


@contextmanager
def hub_of_rank(folder: str, *, host: str, error: Exception | None) -> Iterator[FakeHub]:
    """A hub whose cache is a folder per host; each rank has its own, so that it counts its own downloads."""
    root = Path(folder) / host
    fake = FakeHub(Cache(root))
    fake.files = {"model.safetensors": save({"weight": WEIGHT}), "config.json": b"{}"}
    fake.error = error

    def download(*args: Any, **options: Any) -> str:
        if not options.get("local_files_only", False):
            time.sleep(DOWNLOAD_SECONDS)  # long enough for the others to come and look
        return fake(*args, **options)

    with (
        mock.patch.object(constants, "HF_HUB_CACHE", str(root)),
        mock.patch.object(hub, "snapshot_download", download),
        mock.patch.object(socket, "gethostname", return_value=host),
    ):
        yield fake


def sharded_linear() -> nn.Module:
    model = nn.Linear(3, 8, bias=False, device="meta")
    fully_shard(model)
    return model


def load_from_hub(folder: str, hosts: tuple[str, ...]) -> tuple[str, int, bool]:
    """Return this rank's host, how often it downloaded weights, and whether it waited for them."""
    host, model = hosts[dist.get_rank()], sharded_linear()
    with hub_of_rank(folder, host=host, error=None) as fake:
        started = time.monotonic()
        sw.materialize(model, "org/name", timeout=60)
        seconds = time.monotonic() - started
    assert torch.equal(model.weight.full_tensor(), WEIGHT)
    weights = sum(
        "model.safetensors" in patterns or "*.safetensors" in patterns for _, patterns in fake.calls
    )
    return host, weights, seconds > DOWNLOAD_SECONDS


def test_one_rank_downloads_while_the_other_waits(pool: RankPool, tmp_path: Path) -> None:
    of_ranks = pool.run(load_from_hub, str(tmp_path), ("a", "a"), ranks=2)
    assert of_ranks == [("a", 1, True), ("a", 0, True)]
    # The second time nobody does. How long it takes says nothing on a busy machine.
    again = pool.run(load_from_hub, str(tmp_path), ("a", "a"), ranks=2)
    assert [count for _, count, _ in again] == [0, 0]


def load_slowly_from_hub(folder: str) -> float:
    """Return the seconds of a load whose download grows bit by bit, for longer than the timeout."""
    model, root = sharded_linear(), Path(folder) / "a"
    blobs = root / "models--org--name" / "blobs"

    def grow() -> None:
        blobs.mkdir(parents=True, exist_ok=True)
        with (blobs / "weights.incomplete").open("ab") as file:
            for _ in range(GROWTHS):
                time.sleep(SLOW_TIMEOUT_SECONDS / 3)
                file.write(b"more")
                file.flush()
        (blobs / "weights.incomplete").unlink()

    started = time.monotonic()
    with (
        hub_of_rank(folder, host="a", error=None),
        mock.patch.object(hub, "_fetch", growing(hub._fetch, grow)),
    ):
        sw.materialize(model, "org/name", timeout=SLOW_TIMEOUT_SECONDS)
    assert torch.equal(model.weight.full_tensor(), WEIGHT)
    return time.monotonic() - started


def growing(fetch: Any, grow: Callable[[], None]) -> Any:
    def fetched(location: Any, patterns: Any) -> Any:
        if "*.safetensors" in patterns:
            grow()
        return fetch(location, patterns)

    return fetched


def test_a_download_that_grows_is_waited_for(pool: RankPool, tmp_path: Path) -> None:
    seconds = pool.run(load_slowly_from_hub, str(tmp_path), ranks=2)
    assert min(seconds) > GROWTHS * SLOW_TIMEOUT_SECONDS / 3 > 1.5 * SLOW_TIMEOUT_SECONDS


def test_each_file_system_has_one_rank_that_downloads(pool: RankPool, tmp_path: Path) -> None:
    of_ranks = pool.run(load_from_hub, str(tmp_path), ("a", "b", "a", "b"), ranks=4)
    assert [count for _, count, _ in of_ranks] == [1, 1, 0, 0]


def fail_to_download(folder: str, hosts: tuple[str, ...], failing_host: str) -> str:
    """Return what this rank is told; then load, once the hub is back."""
    host, model = hosts[dist.get_rank()], sharded_linear()
    refusal = huggingface_hub.errors.HfHubHTTPError("503: the hub is full", response=mock.MagicMock())
    error = refusal if host == failing_host else None
    with hub_of_rank(folder, host=host, error=error) as fake:
        with pytest.raises(sw.ShardwiseError) as caught:
            sw.materialize(model, "org/name", timeout=60)
        assert model.weight.is_meta
        every_rank(None)
        fake.error = None
        sw.materialize(model, "org/name", timeout=60)
    assert torch.equal(model.weight.full_tensor(), WEIGHT)
    return json.dumps([type(caught.value).__name__, str(caught.value)])


@pytest.mark.parametrize(
    ("hosts", "failing_host", "failing"),
    [(("a", "a"), "a", 0), (("a", "b"), "b", 1)],
    ids=["the first download", "the one of another node"],
)
def test_a_download_that_fails_is_raised_on_all_ranks(
    pool: RankPool, tmp_path: Path, hosts: tuple[str, ...], failing_host: str, failing: int
) -> None:
    told = [
        json.loads(text) for text in pool.run(fail_to_download, str(tmp_path), hosts, failing_host, ranks=2)
    ]
    for rank, (kind, text) in enumerate(told):
        assert kind == ("CheckpointError" if rank == failing else "PeerError")
        assert "503: the hub is full" in text
        assert "org/name" in text
        assert rank == failing or f"rank {failing} on {hosts[failing]} failed first" in text
