"""From a model sharded on meta to one whose shards hold their values."""

from shardwise.materialization.agreement import Agreement, Comparable, timeout_seconds_of
from shardwise.materialization.binding import Binding, Bound, bind, check_bound, listed, permitted
from shardwise.materialization.device import device_of
from shardwise.materialization.fill import Filled, fill_from_source
from shardwise.materialization.load import CPU_STORAGE, CpuStorage
from shardwise.materialization.materialize import (
    FillOptions,
    default_staging_bytes,
    fill_from_files,
    materialize,
    warn_of_unexpected,
)
from shardwise.materialization.meta import take_values
from shardwise.materialization.names import clean_fqn
from shardwise.materialization.open_source import open_source
from shardwise.materialization.progress import shown_by_default
from shardwise.materialization.reporting import collect_report, origins_of, stored_dtypes
from shardwise.materialization.storage import local_bytes_of, trained_parameters_of
from shardwise.materialization.structure import Entry, Structure, entries_of, structure_difference
from shardwise.materialization.verify import Mismatch, VerifyReport, verify_shards

__all__ = [
    "CPU_STORAGE",
    "Agreement",
    "Binding",
    "Bound",
    "Comparable",
    "CpuStorage",
    "Entry",
    "FillOptions",
    "Filled",
    "Mismatch",
    "Structure",
    "VerifyReport",
    "bind",
    "check_bound",
    "clean_fqn",
    "collect_report",
    "default_staging_bytes",
    "device_of",
    "entries_of",
    "fill_from_files",
    "fill_from_source",
    "listed",
    "local_bytes_of",
    "materialize",
    "open_source",
    "origins_of",
    "permitted",
    "shown_by_default",
    "stored_dtypes",
    "structure_difference",
    "take_values",
    "timeout_seconds_of",
    "trained_parameters_of",
    "verify_shards",
    "warn_of_unexpected",
]
