"""Pure planning: which region of which tensor each rank owns, and how it travels. No I/O, no process group."""

from shardwise.plan.exchange_plan import Round, Transfer, exchanged, plan_rounds
from shardwise.plan.layout import Layout, Part
from shardwise.plan.load_plan import Fragment, LoadPlan, Read, plan_load
from shardwise.plan.scatter_plan import (
    BUCKETS_IN_FLIGHT,
    Bucket,
    DirectBucket,
    Piece,
    PlannedTensor,
    ScatterPlan,
    plan_scatter,
)
from shardwise.plan.wanted import Mapped, StoredPiece, WantedTensor, as_stored

__all__ = [
    "BUCKETS_IN_FLIGHT",
    "Bucket",
    "DirectBucket",
    "Fragment",
    "Layout",
    "LoadPlan",
    "Mapped",
    "Part",
    "Piece",
    "PlannedTensor",
    "Read",
    "Round",
    "ScatterPlan",
    "StoredPiece",
    "Transfer",
    "WantedTensor",
    "as_stored",
    "exchanged",
    "plan_load",
    "plan_rounds",
    "plan_scatter",
]
