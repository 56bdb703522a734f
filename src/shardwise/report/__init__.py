"""Tables and pictures of what a load did cost."""

from shardwise.report.figure import save_figure
from shardwise.report.table import comparison_table, render

__all__ = ["comparison_table", "render", "save_figure"]
