"""The facade: a transformers model, its optimizer and scheduler, trained and resumed on shards."""

from shardwise.transformers_model.facade import TransformersModel

__all__ = ["TransformersModel"]
