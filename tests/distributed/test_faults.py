"""A fault on one rank, in every phase and on every route, is one error on all ranks; the next call works."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwise.testing import RankPool
from tests.distributed.faults import FAULTS, RANKS, ROUTES, run_fault, write_files

WITHIN_SECONDS = 30.0
CASES = [(number, route) for number, fault in enumerate(FAULTS) for route in ROUTES if route in fault.routes]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    return write_files(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    ("number", "route"), CASES, ids=[f"{FAULTS[number].name}-{route}" for number, route in CASES]
)
def test_a_fault_is_one_error_on_all_ranks(pool: RankPool, files: Path, number: int, route: str) -> None:
    fault = FAULTS[number]
    seen = pool.run(run_fault, str(files), number, route, ranks=RANKS)
    at = fault.on(route)
    assert seen[at].error == fault.error, seen[at].text
    for rank, of_rank in enumerate(seen):
        assert fault.message in of_rank.text, f"rank {rank}: {of_rank.error}: {of_rank.text}"
        assert of_rank.seconds < WITHIN_SECONDS
        assert not of_rank.leaked, f"rank {rank}"
        if fault.error != "RankMismatchError" and rank != at:
            assert of_rank.error == "PeerError"
            assert f"phase '{fault.phase}': rank {at} on" in of_rank.text
