"""FSDP2 with torch alone."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, final

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from shardwise.errors import ConfigurationError, ModelError
from shardwise.materialization import CpuStorage, telling
from shardwise.strategies.base import Strategy
from shardwise.strategies.fsdp_config import FSDPConfig, efficient_switch
from shardwise.strategies.mesh import device_type_of, ranks_of, ranks_to_tell, resolve_mesh
from shardwise.strategies.precision import check_grad_scaler, check_native_precision, policy_of


@final
class NativeFSDPStrategy(Strategy):
    """Shard models with `fully_shard`, nothing else.

    Args:
        device_mesh: One axis of any name, or `dp_replicate` x `dp_shard`; None is one axis over all ranks.
        mixed_precision: Compute dtype: `"no"`, `"bf16"`, or `"fp16"` on accelerators, whose gradient scaler is then
            `.scaler`. Gradients are reduced in float32.
        fsdp_config: Options of FSDP2; the keys are the fields of `FSDPConfig`.
        memory_efficient_init: Shard on meta and give each rank its own rows (True, the default), or shard what every
            rank has loaded (False). None: True, unless `fsdp_config` says otherwise.
        route: Who reads what of a model that was loaded with `defer=True`: `"auto"`, `"direct"`, `"replicate"`, `"node"`,
            `"rank0"` or `"striped"`. See `shardwise.materialize`.
        timeout: How long to wait for a rank that does not arrive, in seconds or as a timedelta; None is the process
            group's own timeout. After 20 s the ranks that have not arrived are named in the log.
        cpu_storage: `"map"` and `"auto"` let shards of CPU ranks be private pages of the files, which are read when they
            are touched; `"copy"` reads everything at the wrap. See `shardwise.materialize`.
        direct_io: Read files past the page cache where the file system can. See `shardwise.materialize`.
        grad_scaler_config: Arguments of `torch.amp.GradScaler`, for `mixed_precision="fp16"`.

    Raises:
        ConfigurationError: An argument that is unknown, contradictory or not possible on the device.
    """

    name = "native_fsdp"

    def __init__(
        self,
        device_mesh: DeviceMesh | None = None,
        mixed_precision: str = "bf16",
        fsdp_config: Mapping[str, Any] | None = None,
        memory_efficient_init: bool | None = None,
        route: str = "auto",
        timeout: float | timedelta | None = None,
        cpu_storage: CpuStorage = "auto",
        direct_io: bool = False,
        grad_scaler_config: Mapping[str, Any] | None = None,
    ) -> None:
        with telling("NativeFSDPStrategy", ranks_to_tell(device_mesh)):
            config = FSDPConfig.from_dict(fsdp_config)
            device_type = device_type_of(device_mesh)
            check_native_precision(mixed_precision, device_type=device_type)
            check_grad_scaler(grad_scaler_config, mixed_precision=mixed_precision)
            super().__init__(
                mesh=resolve_mesh(device_mesh),
                mixed_precision=mixed_precision,
                config=config,
                memory_efficient_init=efficient_switch(memory_efficient_init, config),
                route=route,
                timeout=timeout,
                cpu_storage=cpu_storage,
                direct_io=direct_io,
            )
            self.scaler: torch.amp.GradScaler | None = None
            if mixed_precision == "fp16":
                self.scaler = torch.amp.GradScaler(device_type, **(grad_scaler_config or {}))

    def wrap_model(self, model: nn.Module, *objects: Any) -> Any:
        """Shard a model in place, fill it, restore buffers and ties, and rebind optimizers.

        All ranks of the mesh call this together. After an error the model is not usable: load it again.

        Args:
            model: Not sharded; on the efficient path only global rank 0's values count.
            *objects: Optimizers made on its parameters and not stepped yet. One that was made before the wrap and is not
                passed here would train nothing: its first step raises `OptimizerError`.

        Returns:
            The model alone, or the model and the same optimizer objects in order.

        Raises:
            ModelError: The model cannot be sharded as it is.
            OptimizerError: An optimizer cannot be rebound.
            RankError: Ranks differ, one of them failed, or one did not arrive.
        """
        with telling("wrap_model", ranks_of(self.device_mesh)):
            others = [obj for obj in objects if not isinstance(obj, Optimizer)]
            if others:
                raise ConfigurationError(
                    f"wrap_model: expected optimizers after the model, got {type(others[0]).__name__}. Schedulers and data "
                    "loaders need no wrapping here; AccelerateStrategy takes them."
                )
        self._wrap(model, objects, policy_of(self.mixed_precision), prepare=lambda: None)
        return (model, *objects) if objects else model

    def _refuse(self, model: nn.Module) -> None:
        """Nothing: what `fully_shard` cannot take is refused for both strategies alike."""

    def _take_optimizer(self, optimizer: Optimizer) -> Optimizer:
        return optimizer

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """Return the model under `torch.compile`; `fully_shard` itself wraps nothing."""
        inner: nn.Module = getattr(model, "_orig_mod", model)
        # A model that was compiled before the wrap is sharded under its compiled wrapper, not itself.
        if not isinstance(inner, FSDPModule) and not isinstance(model, FSDPModule):
            raise ModelError(
                f"unwrap_model: expected a model from wrap_model, got {type(inner).__name__}, which is not sharded"
            )
        return inner
