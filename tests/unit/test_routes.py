"""Who reads what, for any mesh and any set of ranks that see the files: pure, without a process group."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from shardwise.checkpoint import StateDictSource, StoredTensor
from shardwise.errors import ConfigurationError
from shardwise.materialization.source_cost import cost_of_source
from shardwise.materialization.source_plan import plan_sources
from shardwise.materialization.wanted import Wanted
from shardwise.plan import (
    Layout,
    Route,
    Sight,
    WantedTensor,
    arriving_directly,
    as_stored,
    choose_route,
    divide,
    plan_exchange,
    plan_reads,
    require_covered,
)
from shardwise.plan.routes import STRIPED_FROM_RANKS

STAGING_BYTES = 2**20


def wanted_of(
    layout: Layout,
    shapes: list[tuple[int, ...]],
    *,
    may_map: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> list[WantedTensor]:
    wanted, start = [], 0
    for number, shape in enumerate(shapes):
        nbytes = math.prod(shape) * 2
        stored = StoredTensor(
            name=f"w{number}", shape=shape, dtype=torch.bfloat16, file="f", start=start, stop=start + nbytes
        )
        start += nbytes
        wanted.append(
            WantedTensor(
                fqn=f"w{number}",
                shape=shape,
                dtype=dtype,
                layout=layout,
                pieces=as_stored(stored),
                may_map=may_map,
                partial=False,
            )
        )
    return wanted


def layout_of(*axes: tuple[int, Placement]) -> Layout:
    shape = tuple(size for size, _ in axes)
    return Layout(
        mesh_shape=shape,
        mesh_ranks=tuple(range(math.prod(shape))),
        placements=tuple(placement for _, placement in axes),
    )


HSDP = layout_of((2, Replicate()), (2, Shard(0)))
FSDP = layout_of((4, Shard(0)))
LARGE = [(512, 4096)]  # 4 MiB


def sight(nodes: str = "aaaa", blind: tuple[int, ...] = (), *, in_memory: bool = False) -> Sight:
    ranks = tuple(range(len(nodes)))
    return Sight(
        ranks=ranks,
        nodes=tuple(nodes),
        readers=tuple(rank for rank in ranks if rank not in blind),
        in_memory=in_memory,
    )


@pytest.mark.parametrize(
    ("layout", "seen", "may_map", "name", "reason"),
    [
        (FSDP, sight(), False, "direct", "no two keep the same"),
        (HSDP, sight(), False, "replicate", "request 2.00 times"),
        (
            HSDP,
            sight(),
            True,
            "direct",
            "what several keep is mapped",
        ),  # the pages of one node are in its memory once
        (HSDP, sight("aabb"), True, "replicate", "2.00 times"),
        (HSDP, sight("abab"), True, "direct", "what several keep is mapped"),  # replicas are on one node
        (FSDP, sight("aabb", (1, 3)), False, "node", "no access from ranks 1, 3, but"),
        (FSDP, sight("aabb", (0, 2, 3)), False, "rank0", "rank 1 reads for all"),
        (FSDP, sight(blind=(1, 2, 3), in_memory=True), False, "rank0", "rank 0 alone holds the values"),
        (layout_of((1, Shard(0))), sight("a"), False, "direct", "there is one rank"),
    ],
)
def test_auto(layout: Layout, seen: Sight, may_map: bool, name: str, reason: str) -> None:
    route = choose_route("auto", wanted_of(layout, LARGE, may_map=may_map), seen, max_read_bytes=2**20)
    assert route.name == name
    assert reason in route.reason


def test_auto_stripes_where_many_ranks_would_read_little_each() -> None:
    ranks = STRIPED_FROM_RANKS
    wanted = wanted_of(layout_of((ranks, Shard(0))), [(4096, 4096)] * 80)  # 512 KiB a rank of each
    seen = sight("a" * ranks)
    assert choose_route("auto", wanted, seen, max_read_bytes=2**24).name == "striped"
    large = wanted_of(layout_of((ranks, Shard(0))), [(4096 * 4, 4096)] * 80)
    assert choose_route("auto", large, seen, max_read_bytes=2**24).name == "direct"
    mapped = wanted_of(layout_of((ranks, Shard(0))), [(4096, 4096)] * 80, may_map=True)
    assert choose_route("auto", mapped, seen, max_read_bytes=2**24).name == "direct"


def test_auto_looks_at_the_reads_of_all_ranks() -> None:
    ranks = 2 * STRIPED_FROM_RANKS
    layout = layout_of((ranks, Shard(0)))
    # The first rank reads 64 MiB in four runs beside; all of them read little of very many.
    wanted = wanted_of(layout, [(1, 2**23)] * 4 + [(4096, 4096)] * 80)
    route = choose_route("auto", wanted, sight("a" * ranks), max_read_bytes=2**24)
    assert route.name == "striped"
    assert "a rank would make 80 reads of 262 KiB on average" in route.reason


@pytest.mark.parametrize("route", ["direct", "replicate", "striped"])
def test_a_route_that_needs_every_rank_to_read_is_refused_where_one_cannot(route: str) -> None:
    with pytest.raises(ConfigurationError, match=r"got no access from ranks 1, 3"):
        choose_route(route, wanted_of(FSDP, LARGE), sight("aabb", (1, 3)), max_read_bytes=2**20)


def test_the_node_route_needs_a_reader_on_every_node() -> None:
    with pytest.raises(ConfigurationError, match=r"expected a rank on every node .* got none on b"):
        choose_route("node", wanted_of(FSDP, LARGE), sight("aabb", (2, 3)), max_read_bytes=2**20)


# --- whatever the route, every shard is filled once, and storage is read no more than the route says ---

LAYOUTS = [
    FSDP,
    HSDP,
    layout_of((2, Replicate()), (3, Shard(0))),
    layout_of((2, Shard(0)), (2, Replicate())),
    layout_of((2, Shard(0)), (2, Shard(1))),
    layout_of(
        (3, Replicate()),
    ),
    layout_of((2, Replicate()), (2, Shard(1))),
]


@given(
    layout=st.sampled_from(LAYOUTS),
    more=st.sampled_from(LAYOUTS),
    shapes=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 7)) | st.tuples(st.integers(0, 40)),
        min_size=1,
        max_size=5,
    ),
    route=st.sampled_from(["direct", "replicate", "node", "rank0", "striped"]),
    nodes=st.lists(st.sampled_from("ab"), min_size=6, max_size=6),
    buffer_bytes=st.integers(64, 400),
)
@settings(max_examples=300)
def test_every_route_fills_every_shard(
    layout: Layout,
    more: Layout,
    shapes: list[tuple[int, ...]],
    route: str,
    nodes: list[str],
    buffer_bytes: int,
) -> None:
    if any(len(shape) == 1 for shape in shapes):
        layout = more = HSDP
    ranks = tuple(range(max(len(layout.mesh_ranks), len(more.mesh_ranks))))
    seen = Sight(ranks=ranks, nodes=tuple(nodes[: len(ranks)]), readers=ranks)
    wanted = wanted_of(layout, shapes)
    wanted += [
        WantedTensor(
            fqn=f"more.{t.fqn}",
            shape=t.shape,
            dtype=t.dtype,
            layout=more,
            pieces=t.pieces,
            may_map=False,
            partial=False,
        )
        for t in wanted
    ]
    requested = 0
    rounds: dict[tuple[tuple[int, ...], frozenset[int]], set[int]] = {}
    orders: list[list[tuple[int, ...]]] = []
    for rank in ranks:
        division = divide(Route(name=route, reason=""), wanted, seen).of(rank)
        direct = plan_reads([wanted[i] for i in division.direct], rank=rank, max_read_bytes=64)
        arriving = [arriving_directly(direct, wanted)]
        requested += direct.storage_bytes
        for sharing in division.sharings:
            assert rank in sharing.ranks
            plan = plan_exchange(
                wanted,
                sharing.chosen,
                ranks=sharing.ranks,
                rank=rank,
                buffer_bytes=buffer_bytes,
                readers=sharing.readers,
            )
            arriving.append(plan.arriving)
            requested += plan.storage_bytes
            assert plan.storage_bytes == 0 or rank in sharing.readers
            rounds.setdefault((sharing.ranks, sharing.chosen), set()).add(len(plan))
        orders.append([sharing.ranks for sharing in division.sharings])
        require_covered(wanted, arriving, rank=rank, name="the case")
    assert all(
        len(of_group) == 1 for of_group in rounds.values()
    )  # each rank waits for all rounds of its group
    if route in ("replicate", "striped", "rank0"):
        # The two tensors of one stored tensor may each be read; within one there is no second read.
        assert requested <= 2 * sum(piece.stored.nbytes for t in wanted for piece in t.pieces)


def test_replicas_read_a_share_each_of_what_they_keep_and_nothing_else() -> None:
    wanted = wanted_of(HSDP, [(512, 1024)] * 4)
    total = sum(tensor.pieces[0].stored.nbytes for tensor in wanted)
    by_rank = {}
    for rank in range(4):
        division = divide(Route(name="replicate", reason=""), wanted, sight()).of(rank)
        (sharing,) = division.sharings
        assert sharing.ranks == ((0, 2), (1, 3))[rank % 2]
        assert sharing.keep_the_same
        plan = plan_exchange(
            wanted,
            sharing.chosen,
            ranks=sharing.ranks,
            rank=rank,
            buffer_bytes=STAGING_BYTES,
            readers=sharing.readers,
        )
        by_rank[rank] = plan
    assert sum(plan.storage_bytes for plan in by_rank.values()) == total
    assert {plan.storage_bytes for plan in by_rank.values()} == {total // 4}
    assert {plan.network_bytes for plan in by_rank.values()} == {total // 4}


def test_a_node_reads_only_what_its_ranks_own() -> None:
    wanted = wanted_of(FSDP, [(512, 1024)] * 3)
    total = sum(tensor.pieces[0].stored.nbytes for tensor in wanted)
    requested = []
    for rank in range(4):
        (sharing,) = divide(Route(name="node", reason=""), wanted, sight("aabb", (0, 3))).of(rank).sharings
        assert (sharing.ranks, sharing.readers) == (((0, 1), (1,)) if rank < 2 else ((2, 3), (2,)))
        plan = plan_exchange(
            wanted,
            sharing.chosen,
            ranks=sharing.ranks,
            rank=rank,
            buffer_bytes=STAGING_BYTES,
            readers=sharing.readers,
        )
        requested.append(plan.storage_bytes)
    assert requested == [0, total // 2, total // 2, 0]


def test_pages_that_replicas_on_one_node_map_are_counted_once() -> None:
    wanted = wanted_of(HSDP, LARGE, may_map=True)
    total = wanted[0].pieces[0].stored.nbytes
    for nodes, times in (("aaaa", 1), ("aabb", 2), ("abab", 1)):
        node_of = sight(nodes).node_of
        plans = [plan_reads(wanted, rank=rank, max_read_bytes=2**20, node_of=node_of) for rank in range(4)]
        assert sum(plan.storage_bytes for plan in plans) == times * total, nodes
        assert all(len(plan.mapped) == 1 for plan in plans)


@pytest.mark.parametrize("route", ["rank0", "node"])
@pytest.mark.parametrize("layout", [FSDP, HSDP])
def test_a_rank_that_alone_reads_for_others_maps_its_own_shards(layout: Layout, route: str) -> None:
    seen = sight("aabb", (0, 3)) if route == "node" else sight(blind=(0,))
    readers = (1, 2) if route == "node" else (1,)
    mappable = wanted_of(layout, [(512, 1024), (3, 64), (256, 1024)], may_map=True)
    cast = wanted_of(layout, [(512, 1024)], may_map=True, dtype=torch.float32)
    own_bytes = sum(math.prod(shape) * 2 for shape in ((512, 1024), (256, 1024))) // len(
        layout.ranks_of_shards
    )
    for tensors, mapped_bytes in ((mappable, own_bytes), (cast, 0)):
        source = StateDictSource({"f": torch.empty(1)})
        wanted = Wanted(source=source, pieces=tuple(tensors), converted=())
        cost = cost_of_source(wanted, seen, route=route, staging_bytes=STAGING_BYTES, on_host=True).cost
        for rank in seen.ranks:
            (plan,) = plan_sources(
                [wanted],
                sights=[seen],
                route=route,
                rank=rank,
                device=torch.device("cpu"),
                on_host=True,
                staging_bytes=STAGING_BYTES,
                cpu_storage="auto",
            )
            mapped = {each.fqn: each.nbytes for each in plan.direct.mapped}
            large = {
                fqn: nbytes for fqn, nbytes in mapped.items() if fqn != "w1"
            }  # of three rows one rank's is short
            assert sum(large.values()) == (mapped_bytes if rank in readers else 0)
            assert cost.mapped_bytes[rank] == sum(mapped.values())
            assert cost.storage_bytes[rank] == plan.storage_bytes
            assert (plan.storage_bytes > 0) == (rank in readers)
            kept = {each.fqn for of in plan.exchanges for turn in of.rounds() for each in turn.kept}
            assert not kept & mapped.keys()
            assert mapped_bytes == 0 or "w0" not in kept


def test_replicas_of_a_rank() -> None:
    layout = layout_of((2, Replicate()), (3, Shard(0)), (2, Replicate()))
    assert layout.replicas(3) == (2, 3, 8, 9)
    assert layout.replicas(99) == ()
    assert FSDP.replicas(2) == (2,)


def test_replicas_compare_what_they_keep_in_every_layout() -> None:
    """Ranks 0 and 1 keep copies of a tensor over all ranks, and of one that is theirs alone."""
    over_all = Layout(mesh_shape=(2, 2), mesh_ranks=(0, 2, 1, 3), placements=(Replicate(), Shard(0)))
    wanted = [
        *wanted_of(over_all, [(512, 4096)]),
        *wanted_of(Layout.replicated((0, 1)), [(512, 4096)] * 2)[1:],
    ]
    (plan,) = plan_sources(
        [Wanted(source=StateDictSource({"none": torch.empty(1)}), pieces=tuple(wanted), converted=())],
        sights=[sight()],
        route="replicate",
        rank=0,
        device=torch.device("cpu"),
        on_host=True,
        staging_bytes=STAGING_BYTES,
        cpu_storage="copy",
    )
    assert {ranks: sorted(fqns) for ranks, fqns in plan.replicated.items()} == {(0, 1): ["w0", "w1"]}
