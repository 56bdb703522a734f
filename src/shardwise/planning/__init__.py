"""What a job would cost, worked out in one process from headers or a config."""

from shardwise.planning.job_plan import JobPlan, Way
from shardwise.planning.job_planner import plan_job
from shardwise.planning.load_plan import LoadPlan
from shardwise.planning.planner import plan_load
from shardwise.planning.predicted import Predicted, predicted_for

__all__ = ["JobPlan", "LoadPlan", "Predicted", "Way", "plan_job", "plan_load", "predicted_for"]
