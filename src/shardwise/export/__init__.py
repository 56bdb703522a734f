"""From shards back to a checkpoint that anyone can load: each rank writes its own bytes."""

from shardwise.export.export import export_checkpoint
from shardwise.export.file_plan import check_max_shard_size
from shardwise.export.report import ExportReport, RankExport

__all__ = ["ExportReport", "RankExport", "check_max_shard_size", "export_checkpoint"]
