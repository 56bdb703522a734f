"""From checkpoint names and layouts to a model's parameters, as data: which element is stored where."""

from shardwise.conversion.declared import declaration_of, is_transformers_model, pinned_dtypes
from shardwise.conversion.groups import ConversionGroup, Declaration
from shardwise.conversion.pieces import Piece, whole
from shardwise.conversion.recipes import KeyMap, Recipe, WholeGroup, derive
from shardwise.conversion.saved import SavedTensor, Taken, saved_tensors
from shardwise.conversion.tracing import Part

__all__ = [
    "ConversionGroup",
    "Declaration",
    "KeyMap",
    "Part",
    "Piece",
    "Recipe",
    "SavedTensor",
    "Taken",
    "WholeGroup",
    "declaration_of",
    "derive",
    "is_transformers_model",
    "pinned_dtypes",
    "saved_tensors",
    "whole",
]
