"""From checkpoint names and layouts to a model's parameters, as data: which element is stored where."""

from shardwise.conversion.declared import declaration_of, is_transformers_model, pinned_dtypes
from shardwise.conversion.groups import ConversionGroup, Declaration
from shardwise.conversion.pieces import Piece, whole
from shardwise.conversion.recipes import KeyMap, Recipe, WholeGroup, derive
from shardwise.conversion.tracing import Part

__all__ = [
    "ConversionGroup",
    "Declaration",
    "KeyMap",
    "Part",
    "Piece",
    "Recipe",
    "WholeGroup",
    "declaration_of",
    "derive",
    "is_transformers_model",
    "pinned_dtypes",
    "whole",
]
