"""Tables, pictures, pages and traces of what a load did cost."""

from shardwise.report.documents import read_documents
from shardwise.report.figure import save_figure
from shardwise.report.page import save_page
from shardwise.report.table import comparison_table, render
from shardwise.report.trace import save_trace
from shardwise.report.words import agreement_lines, fine_tuning_lines

__all__ = [
    "agreement_lines",
    "comparison_table",
    "fine_tuning_lines",
    "read_documents",
    "render",
    "save_figure",
    "save_page",
    "save_trace",
]
