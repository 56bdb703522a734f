"""A fault on one rank, in every phase and on every route, is one error on all ranks; the next call works."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwise.testing import RankPool
from tests.distributed.call_faults import CALL_FAULTS, run_call_fault
from tests.distributed.call_faults import RANKS as CALL_RANKS
from tests.distributed.fault_calls import write_models
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
        # What a rank finds itself, as replicas that differ do, has no phase.
        assert ", phase '" not in of_rank.text or f", phase '{fault.phase}'" in of_rank.text, of_rank.text
        if fault.error != "RankMismatchError" and rank != at:
            assert of_rank.error == "PeerError", of_rank.text
            assert f", phase '{fault.phase}': rank {at} on" in of_rank.text


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What other calls load."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    "number", range(len(CALL_FAULTS)), ids=[f"{fault.name}-{fault.call}" for fault in CALL_FAULTS]
)
def test_a_fault_in_another_call_is_one_error_on_all_ranks(pool: RankPool, models: Path, number: int) -> None:
    fault = CALL_FAULTS[number]
    seen = pool.run(run_call_fault, str(models), number, ranks=CALL_RANKS)
    assert seen[fault.on].error == fault.error, seen[fault.on].text
    for rank, of_rank in enumerate(seen):
        assert fault.message in of_rank.text, f"rank {rank}: {of_rank.error}: {of_rank.text}"
        assert of_rank.seconds < WITHIN_SECONDS
        assert not of_rank.leaked, f"rank {rank}"
        assert f"phase '{fault.phase}'" in of_rank.text or rank == fault.on
        if fault.error != "RankMismatchError" and rank != fault.on:
            assert of_rank.error == "PeerError", of_rank.text
            assert f"rank {fault.on} on" in of_rank.text
