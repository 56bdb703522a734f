"""How a strategy wraps."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from shardwise.materialization import CpuStorage
from shardwise.strategies.fsdp_config import FSDPConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class WrapOptions:
    """How a strategy wraps.

    Args:
        strategy: Its name, for the report.
        mesh: One axis, or replicate x shard.
        config: Checked `fsdp_config`.
        policy: Compute and reduce dtypes.
        efficient: Shard on meta and fill from the source rank; otherwise shard what every rank holds.
        staging_bytes: Bound of the staging buffers, in bytes.
        cpu_storage: Whether shards in host memory may be pages of the file.
        route: That files are read on.
        timeout_seconds: How long to wait for other ranks.
    """

    strategy: str
    mesh: DeviceMesh
    config: FSDPConfig
    policy: MixedPrecisionPolicy
    efficient: bool
    staging_bytes: int
    cpu_storage: CpuStorage
    route: str
    timeout_seconds: float

    def lines(self) -> tuple[str, ...]:
        """Return what all ranks must have alike, one line for each option."""
        return (
            f"option strategy: {self.strategy}",
            f"option memory_efficient_init: {self.efficient}",
            f"option mesh: {tuple(self.mesh.shape)}",
            f"option reshard_after_forward: {self.config.reshard}",
            f"option activation_checkpointing: {self.config.activation_checkpointing}",
            f"option ignored_params: {', '.join(sorted(self.config.ignored_params))}",
            f"option shard_placement_fn: {self.config.shard_placement_fn is not None}",
            f"option cpu_offload: {type(self.config.offload_policy).__name__}",
            f"option mixed precision: {self.policy}",
            f"option staging_bytes: {self.staging_bytes}",
            f"option cpu_storage: {self.cpu_storage}",
            f"option route: {self.route}",
        )
