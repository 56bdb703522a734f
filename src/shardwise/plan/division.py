"""How the reading of a source is divided among ranks: which read for themselves, and which hand each other what they own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardwise.plan.chosen import exchanged
from shardwise.plan.layout import Layout
from shardwise.plan.routes import Route
from shardwise.plan.sight import Sight
from shardwise.plan.wanted import WantedTensor

_Groups = tuple[tuple[int, ...], ...]


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


def _groups_of_all(route: str, sight: Sight) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield each group of ranks that exchange everything, and those of them that read."""
    if route == "striped":
        yield sight.ranks, sight.ranks
    elif route == "rank0":
        yield sight.ranks, sight.readers[:1]
    else:
        for node, ranks in sight.ranks_of_node.items():
            yield ranks, (sight.reader_of_node[node],)
