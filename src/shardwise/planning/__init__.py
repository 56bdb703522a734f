"""What a load would cost a job of any size, worked out in one process from headers or a config."""

from shardwise.planning.load_plan import LoadPlan
from shardwise.planning.planner import plan_load

__all__ = ["LoadPlan", "plan_load"]
