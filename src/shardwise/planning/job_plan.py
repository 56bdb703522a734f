"""What bringing a model up and training it would cost, on each route and in the plain ways."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from shardwise.planning.cost import Cost
from shardwise.planning.load_plan import LoadPlan
from shardwise.planning.rates import Rates
from shardwise.planning.training_state import TrainingState
from shardwise.planning.verdict import Limits, Need, Verdict

SCHEMA: Final = "shardwise.plan/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to bring the model up.

    Args:
        cost: At load.
        kind: Whether it is a route of shardwise, or a plain way.
        chosen: Whether `route="auto"`, or the route that was asked for, comes to it.
        reads: Of all ranks; None of plain ways, where other libraries map files.
        mean_read_bytes: Mean size of a read; None of plain ways.
        rank_files: Files that one rank opens, at most; None of plain ways.
        training: What a rank holds after it, in training.
        seconds: At the rates; None without them.
        fits: Within the limits; None without them.
    """

    cost: Cost
    kind: Literal["route", "plain"]
    chosen: bool
    reads: int | None
    mean_read_bytes: int | None
    rank_files: int | None
    training: TrainingState
    seconds: float | None
    fits: bool | None

    @property
    def name(self) -> str:
        """A route, or what people call a plain way."""
        return self.cost.name

    def to_json(self) -> dict[str, Any]:
        """Return the way as plain data, its cost and the rest side by side."""
        found = asdict(self)
        return {**found.pop("cost"), **found, "training": self.training.to_json()}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """What a job would cost.

    Args:
        load: On the route that is taken.
        ways: Each route that makes a difference, then the plain ways.
        training: What a rank holds in training after the route that is taken.
        ranks_per_node: On the fullest node.
        rates: That seconds are worked out with.
        limits: That were given.
        verdict: On the route that is taken; None without limits.
    """

    load: LoadPlan
    ways: tuple[Way, ...]
    training: TrainingState
    ranks_per_node: int
    rates: Rates
    limits: Limits
    verdict: Verdict | None

    def way(self, name: str) -> Way | None:
        """Return the way of a name; None where it was not planned."""
        return next((way for way in self.ways if way.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data for `json.dump`."""
        return {
            "schema": SCHEMA,
            "load": self.load.to_json(),
            "ways": [way.to_json() for way in self.ways],
            "training": self.training.to_json(),
            "ranks_per_node": self.ranks_per_node,
            "rates": asdict(self.rates),
            "limits": asdict(self.limits),
            "verdict": None if self.verdict is None else asdict(self.verdict),
        }


def need_of(*, node_host_bytes: int, device_bytes: int, training: TrainingState, ranks_per_node: int) -> Need:
    """Return what a node and a device need for a load and the training after it.

    Args:
        node_host_bytes: At load, of a node.
        device_bytes: At load, of a device.
        training: After it, of a rank.
        ranks_per_node: On the fullest node.
    """
    return Need(
        load_host_bytes=node_host_bytes,
        load_device_bytes=device_bytes,
        training_host_bytes=ranks_per_node * training.host_bytes,
        training_device_bytes=training.device_bytes,
    )


def way_of_route(
    plan: LoadPlan,
    *,
    chosen: bool,
    training: TrainingState,
    ranks_per_node: int,
    rates: Rates,
    limits: Limits,
) -> Way:
    """Return a route as a way: reading and moving overlap.

    Args:
        plan: Of the route.
        chosen: Whether it is the one that is taken.
        training: After it.
        ranks_per_node: On the fullest node.
        rates: For the seconds.
        limits: For whether it fits.
    """
    cost = Cost(
        name=plan.route,
        host_peak_bytes=plan.host_peak_bytes,
        node_host_peak_bytes=plan.node_host_peak_bytes,
        device_peak_bytes=plan.device_peak_bytes,
        storage_bytes=plan.storage_bytes,
        node_storage_bytes=plan.node_storage_bytes,
        rank_storage_bytes=plan.rank_storage_bytes,
        network_bytes=plan.network_bytes,
        node_network_bytes=plan.node_network_bytes,
        rank_network_bytes=max(plan.rank_network_bytes, plan.rank_sent_bytes),
    )
    return Way(
        cost=cost,
        kind="route",
        chosen=chosen,
        reads=plan.reads,
        mean_read_bytes=plan.mean_read_bytes,
        rank_files=plan.rank_files,
        training=training,
        # What ranks of a node request twice is in its page cache the second time, as it is counted of the plain ways.
        seconds=rates.seconds(
            read_bytes=min(plan.node_storage_bytes, plan.stored_bytes),
            moved_bytes=cost.rank_network_bytes,
            at_once=True,
        ),
        fits=_fits(cost, training, ranks_per_node, limits),
    )


def way_of_plain(
    cost: Cost, *, training: TrainingState, ranks_per_node: int, rates: Rates, limits: Limits
) -> Way:
    """Return a plain way as a way: it reads, and then sends.

    Args:
        cost: Of it.
        training: After it.
        ranks_per_node: On the fullest node.
        rates: For the seconds.
        limits: For whether it fits.
    """
    return Way(
        cost=cost,
        kind="plain",
        chosen=False,
        reads=None,
        mean_read_bytes=None,
        rank_files=None,
        training=training,
        seconds=rates.seconds(
            read_bytes=cost.node_storage_bytes, moved_bytes=cost.rank_network_bytes, at_once=False
        ),
        fits=_fits(cost, training, ranks_per_node, limits),
    )


def _fits(cost: Cost, training: TrainingState, ranks_per_node: int, limits: Limits) -> bool | None:
    need = need_of(
        node_host_bytes=cost.node_host_peak_bytes,
        device_bytes=cost.device_peak_bytes,
        training=training,
        ranks_per_node=ranks_per_node,
    )
    return limits.fits(need) if limits.given else None
