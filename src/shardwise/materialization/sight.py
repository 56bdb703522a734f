"""Which ranks can read a source, and which of them are on one node, as all ranks agree on it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from shardwise.checkpoint import Source, StateDictSource
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.open_source import RemoteSource
from shardwise.plan import Sight
from shardwise.profiling import own_node


def agreed_sights(sources: Sequence[Source], agreement: Agreement, *, key: str) -> list[Sight]:
    """Return which ranks can read each source. All ranks call this together, within a phase.

    Args:
        sources: As this rank has opened them; the same ones, in one order, on all ranks.
        agreement: Of the call.
        key: Unique within the call.
    """
    own = [own_node(), [[not isinstance(source, RemoteSource), is_in_memory(source)] for source in sources]]
    found = [json.loads(text) for text in agreement.gather(key, json.dumps(own))]
    return [
        Sight(
            ranks=agreement.ranks,
            nodes=tuple(node for node, _ in found),
            readers=tuple(
                rank for rank, (_, of_rank) in zip(agreement.ranks, found, strict=True) if of_rank[number][0]
            ),
            in_memory=any(of_rank[number][1] for _, of_rank in found),
        )
        for number in range(len(sources))
    ]


def is_in_memory(source: Source) -> bool:
    """Return whether a source's values are memory of a rank."""
    return isinstance(source, StateDictSource) or (isinstance(source, RemoteSource) and source.in_memory)
