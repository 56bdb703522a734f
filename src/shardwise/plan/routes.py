"""Which route a source takes, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.conversion import Piece
from shardwise.errors import ConfigurationError, shortened
from shardwise.plan.chosen import MAX_WASTE
from shardwise.plan.equal_runs import EqualRuns, equal_runs
from shardwise.plan.sight import Sight
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The route that all ranks take for a source.

    Args:
        name: One of `ROUTES`, not `"auto"`.
        reason: Why it is that one.
    """

    name: str
    reason: str


def check_route(route: str) -> None:
    """Raise unless a route is one of `ROUTES`.

    Raises:
        ConfigurationError: With the list.
    """
    if route not in ROUTES:
        raise ConfigurationError(f"route: expected one of {', '.join(ROUTES)}, got {route!r}")


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
    has_copies = any(tensor.layout.copies > 1 for tensor in wanted)
    kept = "what several keep is mapped by them, or little" if has_copies else "no two keep the same elements"
    return Route(name="direct", reason=f"every rank reads the files, and {kept}")


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
    return shortened(ranks, most=8, between=", ")
