"""What `plan_load` found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

SCHEMA: Final = "shardwise.load_plan/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What a load will cost: of the job, and of the rank for which each figure is the largest.

    Args:
        schema: Name and version of the JSON form.
        model: Directory, hub id or class of the config.
        mesh: Ranks by axis.
        device: `"cpu"` or `"accelerator"`: where shards are.
        estimated: Whether names, sizes and places of stored tensors were guessed from a config.
        route: Who reads what.
        route_reason: Why.
        planned_ranks: How many ranks were planned one by one; the others hold shards of the same shapes as one of these.
        tensors: Number of stored tensors that the model takes.
        stored_bytes: Of these.
        initialised: Number of the model's tensors that the checkpoint lacks.
        storage_bytes: Requested from storage by all ranks together, mapped pages included.
        network_bytes: Moved between ranks, by all ranks together.
        reads: Reads of all ranks together; mapped pages are read as they are touched, and not counted.
        mean_read_bytes: Mean size of a read.
        rank_storage_bytes: Most that one rank requests.
        rank_network_bytes: Most that one rank receives.
        rank_reads: Most reads of one rank.
        rank_files: Most files that one rank opens to read from or to map; the first rank that can read also opens each for its header.
        node_storage_bytes: Most that the ranks of one node request.
        node_network_bytes: Most that the ranks of one node receive.
        rank_sent_bytes: Most that one rank hands to others.
        shard_bytes: Of parameters on one rank, with FSDP2's padding.
        host_peak_bytes: Most by which a rank's anonymous host memory grows, the empty model aside.
        node_host_peak_bytes: Sum of these of the ranks of one node, at most.
        device_peak_bytes: Most by which a rank's device memory grows; 0 on CPU ranks.
    """

    schema: str = SCHEMA
    model: str
    mesh: Mapping[str, int]
    device: str
    estimated: bool
    route: str
    route_reason: str
    planned_ranks: int
    tensors: int
    stored_bytes: int
    initialised: int
    storage_bytes: int
    network_bytes: int
    reads: int
    mean_read_bytes: int
    rank_storage_bytes: int
    rank_network_bytes: int
    rank_reads: int
    rank_files: int
    node_storage_bytes: int
    node_network_bytes: int
    rank_sent_bytes: int
    shard_bytes: int
    host_peak_bytes: int
    node_host_peak_bytes: int
    device_peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data for `json.dump`."""
        return {**asdict(self), "mesh": dict(self.mesh)}

    @property
    def title(self) -> str:
        """Model, mesh and route in one line."""
        mesh = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
        kind = "an estimate from the config" if self.estimated else "from the headers"
        return f"{self.model} on {mesh} ({self.device}), route {self.route}: {kind}"

    def rows(self) -> list[tuple[str, str, str]]:
        """Return what it costs, the whole job and the rank with the most, as text."""
        return [
            ("read from storage", _bytes(self.storage_bytes), _bytes(self.rank_storage_bytes)),
            ("moved between ranks", _bytes(self.network_bytes), _bytes(self.rank_network_bytes)),
            ("reads", f"{self.reads:,}", f"{self.rank_reads:,}"),
            ("mean read", _bytes(self.mean_read_bytes), ""),
            ("files opened", "", f"{self.rank_files:,}"),
            ("shard, with padding", "", _bytes(self.shard_bytes)),
            ("host peak", "", _bytes(self.host_peak_bytes)),
            ("device peak", "", _bytes(self.device_peak_bytes)),
        ]

    def notes(self) -> list[str]:
        """Return what a reader of the figures has to know, a line each."""
        found = [
            f"{self.tensors:,} stored tensors, {_bytes(self.stored_bytes)}; the route: {self.route_reason}."
        ]
        if self.initialised:
            found.append(
                f"The checkpoint lacks {self.initialised:,} of the model's tensors: they are initialised."
            )
        if self.planned_ranks < self.ranks:
            found.append(
                f"{self.planned_ranks:,} of {self.ranks:,} ranks were planned; the others hold shards of the same shapes."
            )
        return found

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        ranks = 1
        for size in self.mesh.values():
            ranks *= size
        return ranks

    def summary(self) -> str:
        """Return the plan as text."""
        rows = [("", "job", "one rank, at most"), *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        table = [
            f"{name:<{widths[0]}}  {of_job:>{widths[1]}}  {of_rank:>{widths[2]}}".rstrip()
            for name, of_job, of_rank in rows
        ]
        return "\n".join([self.title, *table, *self.notes()])


def _bytes(count: int) -> str:
    from shardwise.report.units import format_bytes  # its package needs rich, and a plan does not

    return format_bytes(count, unit=None)
