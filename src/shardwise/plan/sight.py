"""Which ranks can read a source, and on which node each is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


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
