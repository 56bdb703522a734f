"""Every mesh that people use is filled on every route: shards, bytes read, the first forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.distributed.tensor.placement_types import _StridedShard

import shardwise as sw
from shardwise.plan import routes
from shardwise.testing import RankPool
from tests.distributed.layouts import (
    EVEN,
    LAYOUTS,
    UNEVEN,
    require_same_shards,
    shard_pointers,
    token_ids,
    tower,
    tower_on_meta,
    write_tower,
)
from tests.distributed.steps import every_rank, local_of, reshard_all

pytestmark = pytest.mark.distributed

ROUTES = ("auto", "direct", "replicate", "striped", "rank0")
TIMEOUT_SECONDS = 60.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """A checkpoint by the width of its layers."""
    return {inner: write_tower(tmp_path_factory.mktemp("tower"), inner) for inner in (EVEN, UNEVEN)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mesh_on_every_route(pool: RankPool, files: dict[int, str], layout: str) -> None:
    stored = sum(parameter.nbytes for parameter in tower(UNEVEN).parameters())
    for route, (requested, kept) in pool.run(fill_on_routes, files[UNEVEN], layout, ranks=4)[0].items():
        if (
            route == "direct"
        ):  # every rank requests its own shards, copies included; cut columns are read once
            assert stored <= requested <= 1.02 * kept, route
        else:
            assert stored <= requested <= 1.02 * stored, route


def fill_on_routes(file: str, layout: str) -> dict[str, tuple[int, int]]:
    """Return, by route, the bytes that all ranks requested, and those that they keep."""
    expected = tower(UNEVEN)
    LAYOUTS[layout](expected)
    own = sum(local_of(parameter).nbytes for parameter in expected.parameters())
    kept = sum(every_rank(own))
    requested = {}
    for route in ROUTES:
        model = tower_on_meta(UNEVEN)
        LAYOUTS[layout](model)
        with every_copy_counts():
            report = sw.materialize(model, file, route=route, cpu_storage="copy", timeout=TIMEOUT_SECONDS)
        require_same_shards(model, expected)
        assert report.predicted["storage_bytes"] == report.storage_bytes
        assert report.predicted["network_bytes"] == report.network_bytes
        requested[route] = (report.storage_bytes, kept)
    return requested


@contextmanager
def every_copy_counts() -> Iterator[None]:
    """Let the route `auto` look at copies of a model that is far smaller than a real one."""
    before = routes.REPLICATE_FROM_BYTES
    routes.REPLICATE_FROM_BYTES = 0
    try:
        yield
    finally:
        routes.REPLICATE_FROM_BYTES = before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_forward_moves_no_shard_and_computes_the_same(
    pool: RankPool, files: dict[int, str], layout: str
) -> None:
    pool.run(fill_and_forward, files[EVEN], layout, ranks=4)


def fill_and_forward(file: str, layout: str) -> None:
    model = tower_on_meta(EVEN)
    LAYOUTS[layout](model)
    sw.materialize(model, file, cpu_storage="copy", timeout=TIMEOUT_SECONDS)
    before = shard_pointers(model)
    out = model(token_ids())
    reshard_all(model)
    assert shard_pointers(model) == before
    torch.testing.assert_close(out, tower(EVEN)(token_ids()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verify_shards_on_a_mesh(pool: RankPool, files: dict[int, str], layout: str) -> None:
    pool.run(verify_and_find, files[UNEVEN], layout, ranks=4)


def verify_and_find(file: str, layout: str) -> None:
    """A layout verifies as equal; one changed element of one rank is found, on that rank."""
    model = tower_on_meta(UNEVEN)
    LAYOUTS[layout](model)
    sw.materialize(model, file, cpu_storage="copy", timeout=TIMEOUT_SECONDS)
    report = sw.verify_shards(model, file, timeout=TIMEOUT_SECONDS)
    assert report.is_equal
    assert report.tensors == len(tower(UNEVEN).state_dict())
    if torch.distributed.get_rank() == 3:
        with torch.no_grad():
            local_of(model.layers[1].down.weight)[-1, -1] += 1
    (found,) = sw.verify_shards(model, file, timeout=TIMEOUT_SECONDS).mismatches
    assert (found.fqn, found.rank, found.elements) == ("layers.1.down.weight", 3, 1)


def test_rows_that_tensor_parallelism_and_fsdp_both_cut(pool: RankPool) -> None:
    kinds = pool.run(placements_of_up, ranks=4)
    assert all(kind is _StridedShard for kind in kinds)  # else the layout above tests nothing of it


def placements_of_up() -> type:
    model = tower_on_meta(UNEVEN)
    LAYOUTS["shard x tensor"](model)
    return type(model.layers[0].up.weight.placements[0])


def test_layouts_are_those_of_their_names(pool: RankPool) -> None:
    shards = pool.run(shard_sizes, ranks=4)[0]
    assert shards["replicate x shard"] == 14 * 12
    assert shards["tensor, two copies"] == 14 * 12
    assert shards["replicate x tensor"] == 14 * 12
    assert shards["one axis"] == shards["tensor alone"] == shards["shard x tensor"] == 7 * 12


def shard_sizes() -> dict[str, int]:
    """Return the elements of one weight that rank 0 keeps in each layout."""
    sizes = {}
    for name, lay_out in LAYOUTS.items():
        model: nn.Module = tower_on_meta(UNEVEN)
        lay_out(model)
        sizes[name] = local_of(model.get_parameter("layers.0.up.weight")).numel()
    return sizes
