"""shardwise: bring pretrained PyTorch models into FSDP2 training form, every rank holding only its own shard.

The two strategies wrap a model; the report says what it did cost:

    strategy = shardwise.NativeFSDPStrategy(mixed_precision="bf16")
    model = strategy.load_pretrained(AutoModelForCausalLM, "path-or-hub-id")
    model, optimizer = strategy.wrap_model(model, torch.optim.AdamW(model.parameters()))
    print(strategy.last_report.to_json())
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shardwise.errors import (
    AlreadyWrappedError,
    CallOrderError,
    ChangedFileError,
    CheckpointError,
    CommandError,
    ConfigurationError,
    DamagedFileError,
    DataError,
    DivergedError,
    LeftOnMetaError,
    MissingDependencyError,
    ModelError,
    OptimizerError,
    OutOfMemoryError,
    PeerError,
    RankError,
    RankMismatchError,
    RankTimeoutError,
    ShapeMismatchError,
    ShardwiseError,
    StalledReadError,
    UnsupportedFormatError,
    UnsupportedParameterError,
    UnsupportedVersionError,
)

if TYPE_CHECKING:
    from shardwise.export import ExportReport, RankExport, export_checkpoint
    from shardwise.materialization import Mismatch, VerifyReport, materialize, verify_shards
    from shardwise.planning import LoadPlan, plan_load
    from shardwise.profiling import LoadReport, MemoryProfile, RankReport, phase, profile_memory
    from shardwise.strategies import AccelerateStrategy, NativeFSDPStrategy, fsdp_pretrained_load_context
    from shardwise.transformers_model import TransformersModel

__version__ = "0.1.0"

__all__ = [
    "AccelerateStrategy",
    "AlreadyWrappedError",
    "CallOrderError",
    "ChangedFileError",
    "CheckpointError",
    "CommandError",
    "ConfigurationError",
    "DamagedFileError",
    "DataError",
    "DivergedError",
    "ExportReport",
    "LeftOnMetaError",
    "LoadPlan",
    "LoadReport",
    "MemoryProfile",
    "Mismatch",
    "MissingDependencyError",
    "ModelError",
    "NativeFSDPStrategy",
    "OptimizerError",
    "OutOfMemoryError",
    "PeerError",
    "RankError",
    "RankExport",
    "RankMismatchError",
    "RankReport",
    "RankTimeoutError",
    "ShapeMismatchError",
    "ShardwiseError",
    "StalledReadError",
    "TransformersModel",
    "UnsupportedFormatError",
    "UnsupportedParameterError",
    "UnsupportedVersionError",
    "VerifyReport",
    "export_checkpoint",
    "fsdp_pretrained_load_context",
    "materialize",
    "phase",
    "plan_load",
    "profile_memory",
    "verify_shards",
]

# Looked up at first use: importing torch takes seconds, and the command line's help needs none of it.
_LAZY = {
    "AccelerateStrategy": "shardwise.strategies",
    "ExportReport": "shardwise.export",
    "LoadPlan": "shardwise.planning",
    "LoadReport": "shardwise.profiling",
    "MemoryProfile": "shardwise.profiling",
    "Mismatch": "shardwise.materialization",
    "NativeFSDPStrategy": "shardwise.strategies",
    "RankExport": "shardwise.export",
    "RankReport": "shardwise.profiling",
    "TransformersModel": "shardwise.transformers_model",
    "VerifyReport": "shardwise.materialization",
    "export_checkpoint": "shardwise.export",
    "fsdp_pretrained_load_context": "shardwise.strategies",
    "materialize": "shardwise.materialization",
    "phase": "shardwise.profiling",
    "plan_load": "shardwise.planning",
    "profile_memory": "shardwise.profiling",
    "verify_shards": "shardwise.materialization",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
