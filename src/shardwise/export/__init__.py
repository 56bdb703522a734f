"""From shards back to a checkpoint that anyone can load: each rank writes its own bytes."""

from shardwise.export.export import export_checkpoint
from shardwise.export.report import ExportReport, RankExport

__all__ = ["ExportReport", "RankExport", "export_checkpoint"]
