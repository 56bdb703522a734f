"""Who reads what: which ranks read for themselves, and which read together and hand each other what they own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from shardwise.conversion import Piece
from shardwise.errors import ConfigurationError
from shardwise.plan.chosen import MAX_WASTE, exchanged
from shardwise.plan.equal_runs import EqualRuns, equal_runs
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


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDivision:
    """How the reading is divided among all ranks.

    Args:
        direct: Indices of the tensors of which every rank reads its own bytes.
        sharings: For each kind of sharing, in the order in which all ranks go through theirs, every group's.
        converters: Every group's; each rank is in one of them.
    """

    direct: tuple[int, ...]
    sharings: tuple[tuple[Sharing, ...], ...]
    converters: tuple[Sharing, ...]

    def of(self, rank: int) -> Division:
        """Return it as one rank sees it."""
        of_rank = (each for groups in self.sharings for each in groups if rank in each.ranks)
        return Division(
            direct=self.direct,
            sharings=tuple(of_rank),
            converters=next(each for each in self.converters if rank in each.ranks),
        )


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
    reads, nbytes = _reads_of(wanted, sight, max_read_bytes)
    if (
        len(sight.ranks) >= STRIPED_FROM_RANKS
        and reads >= STRIPED_FROM_READS
        and nbytes < STRIPED_BELOW_BYTES * reads
    ):
        return Route(
            name="striped",
            reason=f"a rank would make {reads:,.0f} reads of {nbytes / reads / 2**10:,.0f} KiB on average",
        )
    return Route(name="direct", reason="every rank reads the files, and no two keep the same elements")


def divide(route: Route, wanted: Sequence[WantedTensor], sight: Sight) -> JobDivision:
    """Divide the reading of a source among the ranks.

    Args:
        route: As `choose_route` returned it.
        wanted: What of the model comes from the source; the same on all ranks.
        sight: Of the source.
    """
    everyone = frozenset(range(len(wanted)))
    if len(sight.ranks) == 1:
        alone = Sharing(ranks=sight.ranks, readers=sight.ranks, chosen=frozenset())
        return JobDivision(direct=tuple(sorted(everyone)), sharings=(), converters=(alone,))
    if route.name in ("rank0", "node", "striped"):
        sharings = tuple(
            Sharing(ranks=ranks, readers=readers, chosen=everyone)
            for ranks, readers in _groups_of_all(route.name, sight)
        )
        return JobDivision(direct=(), sharings=(sharings,) if everyone else (), converters=sharings)
    together = exchanged(wanted, ranks=sight.ranks)
    converters = Sharing(ranks=sight.ranks, readers=sight.ranks, chosen=frozenset())
    kinds: list[tuple[Sharing, ...]] = []
    if together:
        kinds.append((Sharing(ranks=sight.ranks, readers=sight.ranks, chosen=together),))
    of_partition: dict[_Groups, set[int]] = {}
    if route.name == "replicate":
        for layout, indices in _by_layout(wanted, everyone - together):
            groups = layout.replica_groups
            if groups:
                of_partition.setdefault(groups, set()).update(indices)
    for groups in sorted(of_partition):  # the same order on all ranks: each waits for the others of its group
        chosen = frozenset(of_partition[groups])
        kinds.append(
            tuple(Sharing(ranks=group, readers=group, chosen=chosen, keep_the_same=True) for group in groups)
        )
    shared = together.union(*of_partition.values())
    return JobDivision(
        direct=tuple(sorted(everyone - shared)), sharings=tuple(kinds), converters=(converters,)
    )


def _by_layout(wanted: Sequence[WantedTensor], chosen: frozenset[int]) -> Iterator[tuple[Layout, list[int]]]:
    found: dict[int, tuple[Layout, list[int]]] = {}
    for index in sorted(chosen):
        layout = wanted[index].layout
        found.setdefault(id(layout), (layout, []))[1].append(index)
    yield from found.values()


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


def _groups_of_all(route: str, sight: Sight) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield each group of ranks that exchange everything, and those of them that read."""
    if route == "striped":
        yield sight.ranks, sight.ranks
    elif route == "rank0":
        yield sight.ranks, sight.readers[:1]
    else:
        for node, ranks in sight.ranks_of_node.items():
            yield ranks, (sight.reader_of_node[node],)


def _requested_and_stored(wanted: Sequence[WantedTensor], sight: Sight) -> tuple[int, int]:
    """Return the bytes that all ranks would request if each reads its own, and those that are stored.

    Pages that ranks of one node map are in its memory once.
    """
    requested = stored = 0
    nodes_of: dict[int, int] = {}  # of each layout: that keep an element of it, at most
    for tensor in wanted:
        nbytes = sum(each.piece.numel * each.stored.dtype.itemsize for each in tensor.pieces)
        stored += nbytes
        copies = tensor.layout.copies
        if copies > 1 and tensor.always_mapped:
            if id(tensor.layout) not in nodes_of:
                nodes_of[id(tensor.layout)] = max(
                    len({sight.node_of[replica] for replica in group})
                    for group in tensor.layout.replica_groups
                )
            copies = nodes_of[id(tensor.layout)]
        requested += nbytes * copies
    return requested, stored


def _reads_of(wanted: Sequence[WantedTensor], sight: Sight, max_read_bytes: int) -> tuple[float, float]:
    """Return how many reads a rank would make for itself, and their bytes: the mean of all ranks."""
    reads: float = 0
    nbytes: float = 0
    known: dict[tuple[int, tuple[int, ...], Piece], EqualRuns | None] = {}
    for tensor in wanted:
        if tensor.always_mapped:
            continue
        layout, ranks = tensor.layout, len(tensor.layout.mesh_ranks)
        for each in tensor.pieces:
            key = (id(layout), tensor.shape, each.piece)
            if key not in known:
                known[key] = equal_runs(each.piece, tensor.shape, layout)
            runs, itemsize = known[key], each.stored.dtype.itemsize
            of_all = each.piece.numel * itemsize * layout.copies
            nbytes += of_all
            if runs is None:
                reads += max(ranks, of_all / max_read_bytes)
                continue
            first = each.piece.source_start + runs.offset
            owners = (first + each.piece.numel - 1) // runs.numel - first // runs.numel + 1
            reads += max(owners * layout.copies, of_all / max_read_bytes)
    return reads / len(sight.ranks), nbytes / len(sight.ranks)


def _listed(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return ", ".join(map(str, ranks[:8])) + more
