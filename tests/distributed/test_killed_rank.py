"""A rank that is killed in the middle of `materialize`: who is named, by the ranks that are left and by the launcher."""

from __future__ import annotations

import gc
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.checkpoint import SafetensorsSource
from shardwise.compare.launch import run_ranks
from shardwise.errors import CommandError, RankError, RankTimeoutError
from shardwise.testing import RankPool
from tests.distributed.steps import meet_over_the_network

pytestmark = pytest.mark.distributed

SMALL = 70  # tensors, enough of them to be exchanged
TIMEOUT_SECONDS = 5.0
PROMPT_SECONDS = 30.0  # some three are usual


@pytest.fixture(autouse=True)
def _collect_launchers() -> Iterator[None]:
    """Let go of each launcher here: torch's keep-alive timer fails when its own thread is the one that collects it."""
    yield
    gc.collect()


def write(directory: Path, *, exchanged: bool) -> str:
    tensors = {f"{i}.weight": torch.ones(6, 64) for i in range(SMALL)} if exchanged else {}
    save_file(tensors or {"0.weight": torch.ones(6, 64)}, directory / "model.safetensors")
    return str(directory)


def die_while_reading(directory: str, count: int, timeout: float = 50.0) -> None:
    """Rank 1 is killed when it reads; the others wait for it at the end of the phase, or for its data."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(64, 6, bias=False) for _ in range(count)))
    fully_shard(model)

    def killed(*_: Any) -> None:
        (Path(directory) / "died").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 1:
        SafetensorsSource.read_into = SafetensorsSource.read_scattered = killed  # type: ignore[method-assign]
    sw.materialize(model, directory, cpu_storage="copy", staging_bytes=64 * 1024, timeout=timeout)


@pytest.mark.parametrize("exchanged", [False, True], ids=["waiting for a phase", "waiting for data"])
def test_the_ranks_that_are_left_name_it_long_before_the_timeout(
    pool: RankPool, tmp_path: Path, exchanged: bool
) -> None:
    directory, count = write(tmp_path, exchanged=exchanged), SMALL if exchanged else 1
    errors = pool.run_to_errors(die_heard, directory, count, ranks=3, timeout_seconds=60)
    assert "rank 1 ended with exit code -9" in str(errors[1])
    for rank in (0, 2):
        # The first of the two tells the other.
        assert isinstance(errors[rank], RankError)
        assert "phase 'read'" in str(errors[rank])
        assert (
            f"rank 1 on {socket.gethostname()} has ended, or its machine is gone: its connection to rank "
            in str(errors[rank])
        )
        assert "the kernel's out-of-memory killer" in str(errors[rank])


def die_heard(directory: str, count: int) -> None:
    meet_over_the_network()
    try:
        die_while_reading(directory, count)
    except RankError:
        assert time.time() - float((Path(directory) / "died").read_text()) < PROMPT_SECONDS
        raise


def test_without_connections_between_ranks_it_is_named_at_the_timeout(pool: RankPool, tmp_path: Path) -> None:
    directory = write(tmp_path, exchanged=False)
    errors = pool.run_to_errors(die_while_reading, directory, 1, TIMEOUT_SECONDS, ranks=3, timeout_seconds=60)
    for rank in (0, 2):
        assert isinstance(errors[rank], (RankTimeoutError, sw.PeerError))
        assert "phase 'read'" in str(errors[rank])
        assert "rank 1 (of 3 ranks) did not arrive" in str(errors[rank])


def die_under_a_launcher(arguments: Mapping[str, Any]) -> None:
    dist.init_process_group("gloo")
    die_while_reading(arguments["directory"], arguments["count"])


@pytest.mark.parametrize("exchanged", [False, True], ids=["waiting for a phase", "waiting for data"])
def test_the_launcher_names_it_and_not_a_rank_that_was_left(tmp_path: Path, exchanged: bool) -> None:
    arguments = {"directory": write(tmp_path, exchanged=exchanged), "count": SMALL if exchanged else 1}
    with pytest.raises(CommandError, match=r"rank 1 of 2 failed first: it was ended by SIGKILL\."):
        run_ranks(
            die_under_a_launcher,
            arguments,
            ranks=2,
            log_directory=tmp_path / "logs",
            progress=lambda message: None,
        )
