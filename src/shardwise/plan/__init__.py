"""Pure planning: which region of which tensor each rank owns, and how it travels. No I/O, no process group."""

from shardwise.plan.layout import Layout
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
    "Layout",
    "Piece",
    "PlannedTensor",
    "ScatterPlan",
    "plan_scatter",
]
