"""Pure planning: which region of which tensor each rank owns, and how it travels. No I/O, no process group."""

from shardwise.plan.chosen import exchanged
from shardwise.plan.classes import rank_classes
from shardwise.plan.coverage import arriving_directly, require_covered
from shardwise.plan.division import Division, JobDivision, Sharing, divide
from shardwise.plan.exchange_plan import ExchangePlan, Round, Transfer, plan_exchange
from shardwise.plan.job_cost import JobCost, Staging, add_cost, cost_of_job
from shardwise.plan.layout import Layout, Part
from shardwise.plan.load_plan import Fragment, Read, ReadPlan, buffers_wanted, mapped_of_reader, plan_reads
from shardwise.plan.routes import ROUTES, Route, check_route, choose_route
from shardwise.plan.scatter_plan import (
    BUCKETS_IN_FLIGHT,
    Bucket,
    DirectBucket,
    Piece,
    PlannedTensor,
    ScatterPlan,
    plan_scatter,
)
from shardwise.plan.sight import Sight
from shardwise.plan.slices import Extent, Slice, Slices
from shardwise.plan.slicing import slices_of
from shardwise.plan.wanted import Mapped, StoredPiece, WantedTensor, as_stored
from shardwise.plan.write_plan import Write, WritePlan, dealt, dealt_layout, plan_writes, unwritten

__all__ = [
    "BUCKETS_IN_FLIGHT",
    "ROUTES",
    "Bucket",
    "DirectBucket",
    "Division",
    "ExchangePlan",
    "Extent",
    "Fragment",
    "JobCost",
    "JobDivision",
    "Layout",
    "Mapped",
    "Part",
    "Piece",
    "PlannedTensor",
    "Read",
    "ReadPlan",
    "Round",
    "Route",
    "ScatterPlan",
    "Sharing",
    "Sight",
    "Slice",
    "Slices",
    "Staging",
    "StoredPiece",
    "Transfer",
    "WantedTensor",
    "Write",
    "WritePlan",
    "add_cost",
    "arriving_directly",
    "as_stored",
    "buffers_wanted",
    "check_route",
    "choose_route",
    "cost_of_job",
    "dealt",
    "dealt_layout",
    "divide",
    "exchanged",
    "mapped_of_reader",
    "plan_exchange",
    "plan_reads",
    "plan_scatter",
    "plan_writes",
    "rank_classes",
    "require_covered",
    "slices_of",
    "unwritten",
]
