"""From a model sharded on meta to one whose shards hold their values."""

from shardwise.materialize.agreement import Agreement, Comparable, timeout_seconds_of
from shardwise.materialize.fill import Filled, fill_from_source
from shardwise.materialize.meta import take_values
from shardwise.materialize.names import clean_fqn
from shardwise.materialize.storage import local_bytes_of, trained_parameters_of
from shardwise.materialize.structure import Entry, Structure, entries_of, structure_difference

__all__ = [
    "Agreement",
    "Comparable",
    "Entry",
    "Filled",
    "Structure",
    "clean_fqn",
    "entries_of",
    "fill_from_source",
    "local_bytes_of",
    "structure_difference",
    "take_values",
    "timeout_seconds_of",
    "trained_parameters_of",
]
