"""Pure planning: which region of which tensor each rank owns, and how it travels. No I/O, no process group."""

from shardwise.plan.exchange_plan import (
    Incoming,
    Outgoing,
    Round,
    exchanged,
    plan_rounds,
)
from shardwise.plan.layout import Layout, Part
from shardwise.plan.load_plan import Fragment, LoadPlan, Mapped, Read, WantedTensor, plan_load
from shardwise.plan.scatter_plan import (
    BUCKETS_IN_FLIGHT,
    Bucket,
    DirectBucket,
    Piece,
    PlannedTensor,
    ScatterPlan,
    plan_scatter,
)

__all__ = [
    "BUCKETS_IN_FLIGHT",
    "Bucket",
    "DirectBucket",
    "Fragment",
    "Incoming",
    "Layout",
    "LoadPlan",
    "Mapped",
    "Outgoing",
    "Part",
    "Piece",
    "PlannedTensor",
    "Read",
    "Round",
    "ScatterPlan",
    "WantedTensor",
    "exchanged",
    "plan_load",
    "plan_rounds",
    "plan_scatter",
]
