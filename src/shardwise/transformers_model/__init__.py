"""The facade: a transformers model, its optimizer and scheduler, trained and resumed on shards."""

from shardwise.transformers_model.facade import TransformersModel
from shardwise.transformers_model.pending_save import PendingSave

__all__ = ["PendingSave", "TransformersModel"]
