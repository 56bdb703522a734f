"""From a model sharded on meta to one whose shards hold their values."""

from shardwise.materialization.agreement import Agreement, ranks_of_group
from shardwise.materialization.arguments import argument_lines
from shardwise.materialization.begin_call import telling
from shardwise.materialization.binding import (
    Binding,
    Bound,
    bind,
    check_bound,
    nothing_bound,
    permitted,
)
from shardwise.materialization.collector import find_dropped, resting_collector
from shardwise.materialization.comparable import Comparable
from shardwise.materialization.comparing import (
    comparable_digests,
    comparable_lines,
    comparable_structure,
    digest_of,
)
from shardwise.materialization.cpu_storage import CpuStorage, checked_cpu_storage
from shardwise.materialization.device import device_of
from shardwise.materialization.dtypes import kept_dtypes
from shardwise.materialization.fill import Filled, fill_from_source
from shardwise.materialization.from_files import FilledFromFiles, FillOptions, fill_from_files
from shardwise.materialization.initialise import refuse_uninitialisable
from shardwise.materialization.load import allocate_buffers
from shardwise.materialization.materialize import materialize, warn_of_unexpected
from shardwise.materialization.meta import take_values
from shardwise.materialization.names import clean_fqn, model_inside, original_of
from shardwise.materialization.open_source import open_source
from shardwise.materialization.out_of_memory import naming_out_of_memory
from shardwise.materialization.own_group import make_group
from shardwise.materialization.peft_rule import needs_base_values
from shardwise.materialization.progress import shown_by_default
from shardwise.materialization.reporting import collect_report, origins_of, stored_dtypes
from shardwise.materialization.source_cost import SourceCost, cost_of_source
from shardwise.materialization.staging import default_staging_bytes
from shardwise.materialization.storage import (
    drop_waiting_gradients,
    local_bytes_of,
    reduce_waiting_gradients,
    reshard,
    stand_ins_among,
    trained_parameters_of,
)
from shardwise.materialization.stored_ties import require_equal_aliases
from shardwise.materialization.structure import Entry, Structure, entries_of, renewed
from shardwise.materialization.timeouts import timeout_seconds_of
from shardwise.materialization.verify import Mismatch, VerifyReport, verify_shards
from shardwise.materialization.walking import modules_by_prefix, named_modules_of, parameters_of
from shardwise.materialization.wanted import Wanted, wanted_of

__all__ = [
    "Agreement",
    "Binding",
    "Bound",
    "Comparable",
    "CpuStorage",
    "Entry",
    "FillOptions",
    "Filled",
    "FilledFromFiles",
    "Mismatch",
    "SourceCost",
    "Structure",
    "VerifyReport",
    "Wanted",
    "allocate_buffers",
    "argument_lines",
    "bind",
    "check_bound",
    "checked_cpu_storage",
    "clean_fqn",
    "collect_report",
    "comparable_digests",
    "comparable_lines",
    "comparable_structure",
    "cost_of_source",
    "default_staging_bytes",
    "device_of",
    "digest_of",
    "drop_waiting_gradients",
    "entries_of",
    "fill_from_files",
    "fill_from_source",
    "find_dropped",
    "kept_dtypes",
    "local_bytes_of",
    "make_group",
    "materialize",
    "model_inside",
    "modules_by_prefix",
    "named_modules_of",
    "naming_out_of_memory",
    "needs_base_values",
    "nothing_bound",
    "open_source",
    "original_of",
    "origins_of",
    "parameters_of",
    "permitted",
    "ranks_of_group",
    "reduce_waiting_gradients",
    "refuse_uninitialisable",
    "renewed",
    "require_equal_aliases",
    "reshard",
    "resting_collector",
    "shown_by_default",
    "stand_ins_among",
    "stored_dtypes",
    "take_values",
    "telling",
    "timeout_seconds_of",
    "trained_parameters_of",
    "verify_shards",
    "wanted_of",
    "warn_of_unexpected",
]
