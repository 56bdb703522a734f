"""A network interface that gloo cannot use: what needs data from other ranks fails with the setting's name, all else works."""

from __future__ import annotations

import os
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.errors import RankError
from shardwise.testing import RankPool
from tests.distributed.steps import every_rank, meet_over_the_network

pytestmark = pytest.mark.distributed

TIMEOUT_SECONDS = 4.0
LONG_TIMEOUT_SECONDS = 50.0
BAD_INTERFACE = {"GLOO_SOCKET_IFNAME": "none0"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One tensor for each of three ranks."""
    directory = tmp_path_factory.mktemp("interface")
    torch.manual_seed(0)
    save_file({f"{i}.weight": torch.randn(6, 64) for i in range(3)}, directory / "model.safetensors")
    return str(directory)


def fill(directory: str, route: str, *, timeout: float) -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(64, 6, bias=False) for _ in range(3)))
    fully_shard(model)
    sw.materialize(model, directory, route=route, cpu_storage="copy", timeout=timeout)
    for name, value in load_file(Path(directory) / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name).full_tensor(), value), name


def fill_without_an_interface(directory: str, route: str, on: tuple[int, ...]) -> tuple[str, bool, float]:
    """Return the error, whether it is ours, and the seconds until it; afterwards, with a usable interface, the load works."""
    here = BAD_INTERFACE if dist.get_rank() in on else {}
    text, ours, started = "", True, time.monotonic()
    with mock.patch.dict(os.environ, here):
        try:
            fill(directory, route, timeout=TIMEOUT_SECONDS)
        except Exception as error:
            text, ours = str(error), isinstance(error, RankError)
    seconds = time.monotonic() - started
    every_rank(None)
    fill(directory, route, timeout=60)
    return text, ours, seconds


@pytest.mark.parametrize("on", [(0, 1, 2), (1,)], ids=["on all ranks", "on one rank"])
def test_a_load_that_needs_data_from_other_ranks_names_the_setting(
    pool: RankPool, files: str, on: tuple[int, ...]
) -> None:
    for rank, (text, ours, seconds) in enumerate(
        pool.run(fill_without_an_interface, files, "striped", on, ranks=3)
    ):
        assert ours, text
        assert "GLOO_SOCKET_IFNAME" in text, f"rank {rank}: {text}"
        assert "none0" in text, f"rank {rank}: {text}"
        assert seconds < 30  # torch's own timeout is half an hour


def fail_long_before_the_timeout(directory: str) -> tuple[str, float]:
    """One rank cannot use its interface; the others would wait for it to connect."""
    meet_over_the_network()
    here = BAD_INTERFACE if dist.get_rank() == 1 else {}
    started = time.monotonic()
    with mock.patch.dict(os.environ, here), pytest.raises(RankError) as caught:
        fill(directory, "striped", timeout=LONG_TIMEOUT_SECONDS)
    seconds = time.monotonic() - started
    every_rank(None)
    fill(directory, "striped", timeout=60)
    return str(caught.value), seconds


def test_ranks_that_wait_for_a_connection_hear_that_it_cannot_be(pool: RankPool, files: str) -> None:
    for text, seconds in pool.run(fail_long_before_the_timeout, files, ranks=3):
        assert "GLOO_SOCKET_IFNAME" in text
        assert seconds < 30 < LONG_TIMEOUT_SECONDS


def test_agreement_needs_no_group_at_all(pool: RankPool, files: str) -> None:
    """Every phase, and errors too, go over the store."""
    assert all(
        text == "" for text, _, _ in pool.run(fill_without_an_interface, files, "direct", (0, 1, 2), ranks=3)
    )
    for error in pool.run_to_errors(refuse_a_route, files, ranks=3):
        assert "route: expected one of" in str(error)


def refuse_a_route(directory: str) -> None:
    with mock.patch.dict(os.environ, BAD_INTERFACE):
        fill(directory, "teleport" if dist.get_rank() == 1 else "direct", timeout=TIMEOUT_SECONDS)
