"""Who reads what: which ranks read for themselves, and which read together and hand each other what they own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from shardwise.errors import ConfigurationError
from shardwise.plan.chosen import MAX_WASTE, exchanged
from shardwise.plan.layout import Layout
from shardwise.plan.wanted import WantedTensor

ROUTES = ("auto", "direct", "replicate", "node", "rank0", "striped")
REPLICATE_FROM_BYTES = 2**20
"""So many bytes must be saved before a process group is made for it."""
STRIPED_BELOW_BYTES = 2**20
"""Mean size of a rank's reads under which ranks rather read long runs and exchange them."""
STRIPED_FROM_READS = 64
"""So many reads a rank has to make before their size matters."""
STRIPED_FROM_RANKS = 64
"""On fewer ranks an exchange costs more than the reads that it saves."""

_Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Which ranks can read a source, and which of them are on one node.

    Args:
        ranks: Global ranks, in order.
        nodes: Name of each rank's node, in the same order.
        readers: Ranks that can read it, in order.
        in_memory: Whether it is memory of its reader rather than files.
    """

    ranks: tuple[int, ...]
    nodes: tuple[str, ...]
    readers: tuple[int, ...]
    in_memory: bool = False

    @classmethod
    def of_all(cls, ranks: Sequence[int], node: str = "") -> Sight:
        """Return the sight of ranks that share a node and can all read."""
        return cls(ranks=tuple(ranks), nodes=(node,) * len(ranks), readers=tuple(ranks))

    @cached_property
    def node_of(self) -> dict[int, str]:
        """Name of the node by rank."""
        return dict(zip(self.ranks, self.nodes, strict=True))

    @cached_property
    def ranks_of_node(self) -> dict[str, tuple[int, ...]]:
        """Ranks by node, in order."""
        found: dict[str, tuple[int, ...]] = {}
        for rank, node in self.node_of.items():
            found[node] = (*found.get(node, ()), rank)
        return found

    @cached_property
    def reader_of_node(self) -> dict[str, int]:
        """The first rank that can read, by node; nodes without one are absent."""
        found: dict[str, int] = {}
        for rank in self.readers:
            found.setdefault(self.node_of[rank], rank)
        return found

    @property
    def blind(self) -> tuple[int, ...]:
        """Ranks that cannot read."""
        return tuple(sorted(set(self.ranks) - set(self.readers)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The route that all ranks take for a source.

    Args:
        name: One of `ROUTES`, not `"auto"`.
        reason: Why it is that one.
    """

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """Ranks that read together.

    Args:
        ranks: Global ranks, in one order on all of them; this rank is one of them.
        readers: Those of them that read.
        chosen: Indices of the tensors that they exchange.
        keep_the_same: Whether they own the same elements of these, all of them.
    """

    ranks: tuple[int, ...]
    readers: tuple[int, ...]
    chosen: frozenset[int]
    keep_the_same: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """How the reading is divided, seen from one rank.

    Args:
        direct: Indices of the tensors of which every rank reads its own bytes.
        sharings: This rank's part in the others; all ranks go through theirs in one order.
        converters: Ranks that make conversions of whole tensors for each other, and those of them that read.
    """

    direct: tuple[int, ...]
    sharings: tuple[Sharing, ...]
    converters: Sharing


def choose_route(asked: str, wanted: Sequence[WantedTensor], sight: Sight, *, max_read_bytes: int) -> Route:
    """Return the route of a source, the same on all ranks.

    Args:
        asked: One of `ROUTES`.
        wanted: What of the model comes from the source; the same on all ranks.
        sight: Of the source.
        max_read_bytes: Largest read, in bytes.

    Raises:
        ConfigurationError: The route that is asked for needs ranks to read what they cannot.
    """
    if not sight.readers:
        raise ConfigurationError("route: expected a rank that can read the checkpoint, got none")
    if sight.in_memory:
        return Route(name="rank0", reason=f"rank {sight.readers[0]} alone holds the values")
    if asked != "auto":
        _require_sight(asked, sight)
        return Route(name=asked, reason="it was asked for")
    if sight.blind:
        return _around_blind_ranks(sight)
    if len(sight.ranks) == 1:
        return Route(name="direct", reason="there is one rank")
    requested, stored = _requested_and_stored(wanted, sight)
    if requested > MAX_WASTE * stored and requested - stored >= REPLICATE_FROM_BYTES:
        return Route(
            name="replicate",
            reason=f"ranks keep copies: each alone would request {requested / stored:.2f} times what is stored",
        )
    reads, nbytes = _reads_of(wanted, sight.ranks[0], max_read_bytes)
    if (
        len(sight.ranks) >= STRIPED_FROM_RANKS
        and reads >= STRIPED_FROM_READS
        and nbytes < STRIPED_BELOW_BYTES * reads
    ):
        return Route(
            name="striped",
            reason=f"a rank would make {reads:,} reads of {nbytes / reads / 2**10:,.0f} KiB on average",
        )
    return Route(name="direct", reason="every rank reads the files, and no two keep the same elements")


def divide(route: Route, wanted: Sequence[WantedTensor], sight: Sight, *, rank: int) -> Division:
    """Divide the reading of a source among the ranks.

    Args:
        route: As `choose_route` returned it.
        wanted: What of the model comes from the source; the same on all ranks.
        sight: Of the source.
        rank: Global rank.
    """
    everyone = frozenset(range(len(wanted)))
    if len(sight.ranks) == 1:
        alone = Sharing(ranks=sight.ranks, readers=sight.ranks, chosen=frozenset())
        return Division(direct=tuple(sorted(everyone)), sharings=(), converters=alone)
    if route.name in ("rank0", "node", "striped"):
        ranks, readers = _all_through(route.name, sight, rank)
        sharing = Sharing(ranks=ranks, readers=readers, chosen=everyone)
        return Division(direct=(), sharings=(sharing,) if everyone else (), converters=sharing)
    together = exchanged(wanted, ranks=sight.ranks)
    converters = Sharing(ranks=sight.ranks, readers=sight.ranks, chosen=frozenset())
    sharings = [Sharing(ranks=sight.ranks, readers=sight.ranks, chosen=together)] if together else []
    of_partition: dict[_Groups, set[int]] = {}
    if route.name == "replicate":
        for index in sorted(everyone - together):
            groups = _replica_groups(wanted[index].layout)
            if groups:
                of_partition.setdefault(groups, set()).add(index)
    for groups in sorted(of_partition):  # the same order on all ranks: each waits for the others of its group
        for own in (group for group in groups if rank in group):
            chosen = frozenset(of_partition[groups])
            sharings.append(Sharing(ranks=own, readers=own, chosen=chosen, keep_the_same=True))
    shared = together.union(*of_partition.values())
    return Division(direct=tuple(sorted(everyone - shared)), sharings=tuple(sharings), converters=converters)


def _require_sight(asked: str, sight: Sight) -> None:
    if asked in ("direct", "replicate", "striped") and sight.blind:
        raise ConfigurationError(
            f"route={asked!r}: expected every rank to read the checkpoint, got no access from ranks {_listed(sight.blind)}. "
            "Use route='auto', or pass an absolute path that every rank can read."
        )
    if asked == "node":
        nodes = sorted(set(sight.nodes) - set(sight.reader_of_node))
        if nodes:
            raise ConfigurationError(
                f"route='node': expected a rank on every node that can read the checkpoint, got none on {', '.join(nodes)}. Use "
                "route='auto' or 'rank0', or copy the files there."
            )


def _around_blind_ranks(sight: Sight) -> Route:
    blind = _listed(sight.blind)
    if len(sight.reader_of_node) == len(sight.ranks_of_node):
        return Route(name="node", reason=f"no access from ranks {blind}, but from another rank of their node")
    return Route(
        name="rank0",
        reason=f"no access from ranks {blind}, nor from every node; rank {sight.readers[0]} reads for all",
    )


def _all_through(route: str, sight: Sight, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ranks that exchange everything, and those of them that read."""
    if route == "striped":
        return sight.ranks, sight.ranks
    if route == "rank0":
        return sight.ranks, sight.readers[:1]
    node = sight.node_of[rank]
    return sight.ranks_of_node[node], (sight.reader_of_node[node],)


def _replica_groups(layout: Layout) -> _Groups:
    """Return the ranks that keep the same elements, group by group; nothing where each element is kept once."""
    if layout.copies == 1:
        return ()
    return tuple(sorted({tuple(sorted(layout.replicas(rank))) for rank in layout.mesh_ranks}))


def _requested_and_stored(wanted: Sequence[WantedTensor], sight: Sight) -> tuple[int, int]:
    """Return the bytes that all ranks would request if each reads its own, and those that are stored.

    Pages that ranks of one node map are in its memory once.
    """
    requested = stored = 0
    for tensor in wanted:
        nbytes = sum(each.piece.numel * each.stored.dtype.itemsize for each in tensor.pieces)
        stored += nbytes
        copies = tensor.layout.copies
        if copies > 1 and tensor.always_mapped:
            copies = max(
                len({sight.node_of[replica] for replica in tensor.layout.replicas(rank)})
                for rank in tensor.layout.mesh_ranks
            )
        requested += nbytes * copies
    return requested, stored


def _reads_of(wanted: Sequence[WantedTensor], rank: int, max_read_bytes: int) -> tuple[int, int]:
    """Return how many reads a rank would make for itself, and their bytes."""
    sizes = list(_sizes_of_reads(wanted, rank))
    return sum(-(-nbytes // max_read_bytes) for nbytes in sizes), sum(sizes)


def _sizes_of_reads(wanted: Sequence[WantedTensor], rank: int) -> Iterator[int]:
    for tensor in wanted:
        if tensor.mapped_on(rank) is None:
            for each in tensor.pieces_on(rank):
                yield each.piece.numel * each.stored.dtype.itemsize


def _listed(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return ", ".join(map(str, ranks[:8])) + more
