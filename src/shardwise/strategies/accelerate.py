"""FSDP2 through Hugging Face Accelerate."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, final

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from shardwise.errors import ConfigurationError
from shardwise.materialization import CpuStorage, telling
from shardwise.strategies import accelerate_compat as compat
from shardwise.strategies.base import Strategy
from shardwise.strategies.fsdp_config import FSDPConfig, efficient_switch
from shardwise.strategies.load_context import unchanged_environment
from shardwise.strategies.mesh import device_type_of, ranks_of, ranks_to_tell, resolve_mesh
from shardwise.strategies.precision import check_fp8, check_grad_scaler, check_mixed_precision

_log = logging.getLogger("shardwise")


@final
class AccelerateStrategy(Strategy):
    """Shard models so that a real `accelerate.Accelerator` drives the training, on accelerators and on CPU ranks.

    `.accelerator` is that Accelerator: its `backward`, `clip_grad_norm_`, `accumulate`, `save_state` and `load_state`
    work on the wrapped model. Optimizers come back as Accelerate's own wrapper around the same torch optimizer,
    which is what skips the step while gradients accumulate; a scheduler made on the torch optimizer stays valid.

    Args:
        device_mesh: One axis of any name, or `dp_replicate` x `dp_shard`; None is one axis over all ranks.
        mixed_precision: Compute dtype: `"no"`, `"bf16"`, `"fp16"` on accelerators, `"fp8"` where a backend is installed.
        ddp_config: Arguments of `accelerate.DistributedDataParallelKwargs`, for models that are prepared without sharding.
        fsdp_config: Options of FSDP2; the keys are the fields of `FSDPConfig`.
        memory_efficient_init: Shard on meta and give each rank its own rows (True, the default), or stock Accelerate
            (False). None: True, unless `fsdp_config` or the adopted Accelerator says otherwise.
        route: Who reads what of a model that was loaded with `defer=True`: `"auto"`, `"direct"`, `"replicate"`, `"node"`,
            `"rank0"` or `"striped"`. See `shardwise.materialize`.
        timeout: How long to wait for a rank that does not arrive, in seconds or as a timedelta; None is the process
            group's own timeout. After 20 s the ranks that have not arrived are named in the log.
        accelerator: An Accelerator to adopt, built for example from a launch YAML; its precision and FSDP options count.
            Without one, the arguments count and Accelerate's environment variables do not.
        cpu_storage: `"map"` and `"auto"` let shards of CPU ranks be private pages of the files, which are read when they
            are touched; `"copy"` reads everything at the wrap. See `shardwise.materialize`.
        direct_io: Read files past the page cache where the file system can. See `shardwise.materialize`.
        grad_scaler_config: Arguments of `accelerate.utils.GradScalerKwargs`, for `mixed_precision="fp16"`; an adopted
            Accelerator has its own.

    Raises:
        ConfigurationError: An argument that is unknown, contradictory or not possible on the device.
        MissingDependencyError: accelerate is not installed.
    """

    name = "accelerate"

    def __init__(
        self,
        device_mesh: DeviceMesh | None = None,
        mixed_precision: str = "bf16",
        ddp_config: Mapping[str, Any] | None = None,
        fsdp_config: Mapping[str, Any] | None = None,
        memory_efficient_init: bool | None = None,
        route: str = "auto",
        timeout: float | timedelta | None = None,
        accelerator: Any | None = None,
        cpu_storage: CpuStorage = "auto",
        direct_io: bool = False,
        grad_scaler_config: Mapping[str, Any] | None = None,
    ) -> None:
        with telling("AccelerateStrategy", ranks_to_tell(device_mesh)):
            compat.require_supported()
            with unchanged_environment():
                if accelerator is None:
                    plugin = None
                    config = FSDPConfig.from_dict(fsdp_config)
                    device_type = device_type_of(device_mesh)
                else:
                    device_type_of(device_mesh)
                    plugin = compat.plugin_of(accelerator)
                    config = _adopted_config(plugin, fsdp_config, ddp_config, grad_scaler_config)
                    device_type, mixed_precision = accelerator.device.type, accelerator.mixed_precision
                    device_mesh = device_mesh if device_mesh is not None else _mesh_of(accelerator)
                check_mixed_precision(mixed_precision, device_type=device_type)
                check_grad_scaler(grad_scaler_config, mixed_precision=mixed_precision)
                efficient = efficient_switch(memory_efficient_init, config)
                check_fp8(mixed_precision, device_type=device_type, efficient=efficient)
                mesh = resolve_mesh(device_mesh)
                if accelerator is None:
                    accelerator, plugin = _build(
                        config, mixed_precision, ddp_config, grad_scaler_config, device_type
                    )
                elif plugin is None:
                    plugin = compat.make_plugin(config, mixed_precision=mixed_precision)
                compat.enable_fsdp2(accelerator, plugin)
            self.accelerator = accelerator
            self._policy: MixedPrecisionPolicy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
            super().__init__(
                mesh=mesh,
                mixed_precision=mixed_precision,
                config=config,
                memory_efficient_init=efficient,
                route=route,
                timeout=timeout,
                cpu_storage=cpu_storage,
                direct_io=direct_io,
            )

    def wrap_model(self, model: nn.Module, *objects: Any) -> Any:
        """Shard a model in place, fill it, restore buffers and ties, rebind optimizers, and prepare what is passed.

        All ranks of the mesh call this together. After an error the model is not usable: load it again.

        Args:
            model: Not sharded; on the efficient path only global rank 0's values count.
            *objects: Optimizers made on its parameters and not stepped yet, schedulers and data loaders. An optimizer that was
                made before the wrap and is not passed here would train nothing: its first step raises `OptimizerError`.

        Returns:
            The model alone, or the model and the prepared objects in order.

        Raises:
            ModelError: The model cannot be sharded as it is.
            OptimizerError: An optimizer cannot be rebound.
            RankError: Ranks differ, one of them failed, or one did not arrive.
        """
        with telling("wrap_model", ranks_of(self.device_mesh)):
            for obj in objects:
                if not isinstance(obj, (Optimizer, LRScheduler, DataLoader)):
                    raise ConfigurationError(
                        "wrap_model: expected optimizers, schedulers and data loaders after the model, got "
                        f"{type(obj).__name__}"
                    )
        optimizers = [obj for obj in objects if isinstance(obj, Optimizer)]
        ready: dict[int, Any] = {}

        def prepare() -> None:
            compat.register_model(self.accelerator, model)
            # A prepared scheduler looks its optimizer up among the prepared ones, so optimizers go first.
            ready.update((id(obj), self._prepare(obj)) for obj in sorted(objects, key=_preparation_order))

        with unchanged_environment(), compat.forgotten_if_it_fails(self.accelerator):
            if not self.memory_efficient_init and optimizers and self._stock_shards():
                return self._prepare_stock(model, objects)
            self._wrap(model, optimizers, self._policy, prepare=prepare)
        return (model, *(ready[id(obj)] for obj in objects)) if objects else model

    def _take_optimizer(self, optimizer: Optimizer) -> Optimizer:
        prepared: Optimizer = self._prepare(optimizer)
        return prepared

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """Return the model without the wrappers of Accelerate and `torch.compile`."""
        unwrapped: nn.Module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return unwrapped

    def _prepare_stock(self, model: nn.Module, objects: tuple[Any, ...]) -> tuple[Any, ...]:
        prepared: tuple[Any, ...] = ()

        def shard() -> None:
            nonlocal prepared
            prepared = self.accelerator.prepare(model, *objects)

        optimizers = [obj for obj in objects if isinstance(obj, Optimizer)]
        self._wrap(model, optimizers, self._policy, prepare=lambda: None, shard=shard)
        return prepared

    def _refuse(self, model: nn.Module) -> None:
        compat.refuse_second_model(self.accelerator, model)

    def _stock_shards(self) -> bool:
        return compat.shards_itself(
            self.accelerator, self.fsdp_config, mesh_shape=tuple(self.device_mesh.shape)
        )

    def _prepare(self, obj: Any) -> Any:
        if isinstance(obj, Optimizer):
            prepared = self.accelerator.prepare_optimizer(obj, device_placement=False)
            compat.warn_of_optimizers(self.accelerator)
            return prepared
        if isinstance(obj, LRScheduler):
            return self.accelerator.prepare_scheduler(obj)
        return self.accelerator.prepare_data_loader(obj)


def _preparation_order(obj: Any) -> int:
    return 0 if isinstance(obj, Optimizer) else 1


def _build(
    config: FSDPConfig,
    mixed_precision: str,
    ddp_config: Mapping[str, Any] | None,
    grad_scaler_config: Mapping[str, Any] | None,
    device_type: str,
) -> tuple[Any, Any]:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import GradScalerKwargs

    overridden = sorted(
        name
        for name in os.environ
        if name.startswith("FSDP_") or name in ("ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION")
    )
    if overridden:
        _log.info(
            "AccelerateStrategy: its arguments override %s from the environment. Pass accelerator=Accelerator() to use "
            "those instead.",
            ", ".join(overridden),
        )
        for name in overridden:
            del os.environ[name]  # restored by the caller
    plugin = compat.make_plugin(config, mixed_precision=mixed_precision)
    handlers: list[Any] = []
    if grad_scaler_config is not None:
        handlers.append(GradScalerKwargs(**grad_scaler_config))
    if ddp_config is not None:
        try:
            handlers.append(DistributedDataParallelKwargs(**ddp_config))
        except TypeError as error:
            raise ConfigurationError(f"ddp_config: {error}") from error
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            fsdp_plugin=plugin,
            kwargs_handlers=handlers,
            gradient_accumulation_plugin=compat.keep_gradient_state(),
            cpu=device_type == "cpu",
        )
    except (ValueError, ImportError) as error:
        raise ConfigurationError(
            f"AccelerateStrategy: Accelerate refused mixed_precision={mixed_precision!r} on {device_type}: {error}. One "
            "process has one Accelerate state: a second strategy must use the first one's precision and device."
        ) from error
    return accelerator, plugin


def _adopted_config(
    plugin: Any | None,
    fsdp_config: Mapping[str, Any] | None,
    ddp_config: Mapping[str, Any] | None,
    grad_scaler_config: Mapping[str, Any] | None,
) -> FSDPConfig:
    if ddp_config is not None:
        raise ConfigurationError(
            "AccelerateStrategy: ddp_config and accelerator= were both given. Pass DistributedDataParallelKwargs to the "
            "Accelerator instead."
        )
    if grad_scaler_config is not None:
        raise ConfigurationError(
            "AccelerateStrategy: grad_scaler_config and accelerator= were both given. Pass GradScalerKwargs to the "
            "Accelerator instead."
        )
    if plugin is None:
        return FSDPConfig.from_dict(fsdp_config)
    if fsdp_config is not None:
        raise ConfigurationError(
            "AccelerateStrategy: fsdp_config and an Accelerator with its own FSDP plugin were both given. Leave fsdp_config "
            "out, or build the Accelerator without a plugin."
        )
    return compat.config_of(plugin)


def _mesh_of(accelerator: Any) -> DeviceMesh | None:
    mesh: DeviceMesh | None = getattr(accelerator, "torch_device_mesh", None)
    if mesh is None:
        return None
    sharding: DeviceMesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    return sharding
