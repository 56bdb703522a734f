"""What a plan says of a mode that is measured, beside which the measurement can be put."""

from __future__ import annotations

from dataclasses import dataclass

from shardwise.compare.modes import modes_named
from shardwise.errors import ConfigurationError
from shardwise.planning.job_plan import JobPlan
from shardwise.planning.plain_ways import EVERY_RANK

# Where there are no copies, and where there is one node; a plan leaves out the route that comes to another.
_COMES_TO = {"replicate": "direct", "node": "rank0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """Of one mode.

    Args:
        storage_bytes: Requested by shardwise on all ranks, as its reports count; where every rank loads with transformers it
            requests nothing.
        host_peak_bytes: Growth of anonymous host memory of the rank with the most, over load and wrap, the empty model aside.
        device_peak_bytes: The same of device memory.
    """

    storage_bytes: int
    host_peak_bytes: int
    device_peak_bytes: int


def predicted_for(plan: JobPlan, mode: str) -> Predicted:
    """Return what a plan says of one of the modes that `shardwise compare` measures.

    Both strategies cost the same: through Accelerate it is shardwise that shards and fills, but for `accelerate-eager` on accelerators,
    whose `prepare` shards as `fully_shard` does.

    Args:
        plan: With `route="auto"`, and of mixed precision `"no"`, as modes are measured.
        mode: Name of a mode.

    Raises:
        ConfigurationError: There is no such mode, it is another library's, or the plan was made of another route.
    """
    (found,) = modes_named([mode])
    if found.strategy == "peer":
        raise ConfigurationError(
            f"mode {mode!r}: expected a mode of shardwise, got another library's way, of which nothing is predicted here."
        )
    name = EVERY_RANK
    if found.memory_efficient_init:
        name = plan.load.route if found.route == "auto" else found.route
    way = plan.way(name) or plan.way(_COMES_TO.get(name, name))
    if way is None and plan.load.ranks == 1:  # one rank reads for itself, whatever the route is called
        way = plan.way(plan.load.route)
    if way is None:
        raise ConfigurationError(
            f"mode {mode!r}: expected a plan that has {name!r}, got {', '.join(each.name for each in plan.ways)}. Plan with routes=None."
        )
    return Predicted(
        storage_bytes=0 if way.kind == "plain" else way.cost.storage_bytes,
        host_peak_bytes=way.cost.host_peak_bytes,
        device_peak_bytes=way.cost.device_peak_bytes,
    )
