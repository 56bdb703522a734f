"""Pure planning: which region of which tensor each rank owns, and how it travels. No I/O, no process group."""

from shardwise.plan.layout import Layout
from shardwise.plan.scatter_plan import Bucket, Piece, PlannedTensor, ScatterPlan, plan_scatter

__all__ = ["Bucket", "Layout", "Piece", "PlannedTensor", "ScatterPlan", "plan_scatter"]
