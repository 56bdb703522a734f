"""What the two strategies share: loading, wrapping, their records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, final
from weakref import WeakSet

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer

from shardwise.errors import ConfigurationError, OptimizerError
from shardwise.materialization import (
    Agreement,
    CpuStorage,
    Structure,
    argument_lines,
    checked_cpu_storage,
    comparable_lines,
    comparable_structure,
    default_staging_bytes,
    entries_of,
    find_dropped,
    nothing_bound,
    refuse_uninitialisable,
    resting_collector,
    telling,
    timeout_seconds_of,
    trained_parameters_of,
)
from shardwise.plan import check_route
from shardwise.profiling import LoadReport
from shardwise.strategies.added_later import refuse_added_later, watch_for_parameters_added_to
from shardwise.strategies.awaited import refuse_edited
from shardwise.strategies.empty_model import build_from_config
from shardwise.strategies.forgotten import replaced_parameters_marked
from shardwise.strategies.fsdp_config import FSDPConfig
from shardwise.strategies.mesh import ranks_of, source_rank_of
from shardwise.strategies.notices import warn_of_half_masters, warn_of_one_rank
from shardwise.strategies.pretrained import (
    Pretrained,
    load_deferred,
    load_on_source,
    plain_load_context,
    refuse_device_map,
)
from shardwise.strategies.pretrained_arguments import check_pretrained_arguments
from shardwise.strategies.put_adapters import add_adapter, load_adapter
from shardwise.strategies.records import Records
from shardwise.strategies.resized import refuse_means, refuse_resizing, skip_means
from shardwise.strategies.wrap import wrap
from shardwise.strategies.wrap_options import WrapOptions
from shardwise.tensors import floating_dtype


class Strategy(ABC):
    """A way to bring models into FSDP2 form; see `NativeFSDPStrategy` and `AccelerateStrategy`."""

    name: str

    def __init__(
        self,
        *,
        mesh: DeviceMesh,
        mixed_precision: str,
        config: FSDPConfig,
        memory_efficient_init: bool,
        route: str,
        timeout: float | timedelta | None,
        cpu_storage: CpuStorage,
        direct_io: bool,
    ) -> None:
        check_route(route)
        self.device_mesh = mesh
        self.mixed_precision = mixed_precision
        self.fsdp_config = config
        self.memory_efficient_init = memory_efficient_init
        self.route = route
        self.cpu_storage = checked_cpu_storage(cpu_storage, direct_io=direct_io)
        self.direct_io = direct_io
        self.timeout_seconds = timeout_seconds_of(timeout, group=None)
        self.last_report: LoadReport | None = None
        self._wrapped: WeakSet[nn.Module] = WeakSet()
        self._records = Records()

    def load_pretrained(
        self,
        model_cls: Any,
        pretrained_model_name_or_path: str,
        *,
        dtype: Any = "auto",
        missing: str | Sequence[str] = "error",
        defer: bool = True,
        **config_kwargs: Any,
    ) -> nn.Module:
        """Build a pretrained model whose values every rank reads from the files when it is wrapped, its own bytes only.

        All ranks of the strategy's mesh call this together. Without `memory_efficient_init` every rank loads it whole.

        Args:
            model_cls: A transformers model or auto class, for example `AutoModelForCausalLM`.
            pretrained_model_name_or_path: Directory or hub id.
            dtype: In which shards are stored: `"auto"` for the checkpoint's own on every transformers version, or
                a torch dtype or its name, `"bf16"` or `"bfloat16"`.
            missing: What to do about parameters that the checkpoint lacks: `"error"` lists them; `"init"`, or
                patterns of names such as `"score.*"`, lets the model initialise them.
            defer: True: every rank gets meta parameters, bound to their checkpoint as objects: the model may become a
                part of another one before the wrap; its values cannot be edited before that, which `wrap_model` refuses
                where it can see it. False: global rank 0 loads the values, which may be edited before
                the wrap, and the other ranks build on meta.
            **config_kwargs: Further arguments of `from_pretrained`; not `device_map`. `config` is a config, or the directory or
                hub id of one that every rank can read. `trust_remote_code` is False unless it is
                given: no code of the checkpoint runs, and nobody is asked on the terminal.

        Returns:
            The model.

        Raises:
            ConfigurationError: An argument that is not what it should be, or cannot be combined with the strategy.
            CheckpointError: Parameters are missing.
            PeerError: Another rank failed; its error is in the message.
            RankTimeoutError: A rank did not arrive within the timeout.
        """
        find_dropped()
        config_kwargs.setdefault("trust_remote_code", False)
        agreement = self._agreement("load_pretrained")
        is_deferred = defer and self.memory_efficient_init
        with agreement.phase("check") as check:
            check_pretrained_arguments(model_cls, pretrained_model_name_or_path, config_kwargs)
            if not isinstance(dtype, Mapping):
                dtype = floating_dtype(dtype, others=("auto",))
            elif is_deferred:
                raise ConfigurationError(
                    f"dtype: expected one dtype, or 'auto', of a model whose values are read at the wrap, got {dict(dtype)}. "
                    "transformers takes a dtype for each part of a model where it loads itself: use "
                    "load_pretrained(defer=False)."
                )
            check.same = comparable_lines(
                "an argument of load_pretrained",
                argument_lines(
                    deferred=is_deferred,
                    memory_efficient_init=self.memory_efficient_init,
                    dtype=dtype,
                    missing=missing,
                    revision=config_kwargs.get("revision"),
                    subfolder=config_kwargs.get("subfolder"),
                    trust_remote_code=config_kwargs["trust_remote_code"],
                ),
                remedy="Make the strategy, and call load_pretrained, with the same arguments on every rank.",
            )
        with agreement.whole_call():
            if is_deferred:
                model, entries, record, binding = load_deferred(
                    model_cls,
                    pretrained_model_name_or_path,
                    dtype=dtype,
                    missing=missing,
                    config_kwargs=config_kwargs,
                    direct_io=self.direct_io,
                    agreement=agreement,
                )
                self._records.add_deferred(model, entries, record, binding)
                refuse_means(model)
            else:
                model, record = load_on_source(
                    model_cls,
                    pretrained_model_name_or_path,
                    dtype=dtype,
                    missing=missing,
                    config_kwargs=config_kwargs,
                    source_rank=source_rank_of(self.device_mesh) if self.memory_efficient_init else None,
                    agreement=agreement,
                )
                self._records.add_loaded(model, record)
                if any(parameter.is_meta for parameter in model.parameters()):
                    skip_means(model)
        return model

    def from_config(
        self, model_cls: Any, config: Any, *, dtype: Any = "auto", **config_kwargs: Any
    ) -> nn.Module:
        """Build a new model, whose values its own initialisation makes at the wrap, on shards.

        They depend on global rank 0's `torch.initial_seed()` and the names of the modules, not on the number of ranks. All
        ranks of the strategy's mesh call this together. Without `memory_efficient_init` every rank makes the whole model's
        values before it is sharded; they are the same.

        Args:
            model_cls: A transformers model or auto class, for example `AutoModelForCausalLM`.
            config: Of transformers, which is copied; or the directory or hub id of one.
            dtype: In which shards are stored: `"auto"` for the config's own, else float32; or a torch dtype or its name.
            **config_kwargs: Attributes of the config to change, and further arguments of the class's `from_config`.

        Returns:
            The model, on meta.

        Raises:
            ConfigurationError: An argument that does not fit.
            CheckpointError: Parameters that only the class's constructor gives values, which it did on meta; they are listed.
            RankError: Ranks build different models, another rank failed, or one did not arrive.
        """
        find_dropped()
        agreement = self._agreement("from_config")
        with agreement.phase("build") as build, resting_collector():
            refuse_device_map(config_kwargs)
            dtype = floating_dtype(dtype, others=("auto",))
            model = build_from_config(model_cls, config, dtype=dtype, **config_kwargs)
            entries = entries_of(model)
            refuse_uninitialisable(model, nothing_bound(entries).absent)
            build.same = comparable_structure(
                Structure.of(entries), (), remedy="Pass the same class, config and dtype on every rank."
            )
        pretrained = Pretrained(name=type(model).__name__, absent=frozenset())
        self._records.add_deferred(model, entries, pretrained, nothing_bound(entries))
        return model

    def add_adapter(
        self,
        model: nn.Module,
        config: Any,
        *,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
    ) -> nn.Module:
        """Put a new PEFT adapter into a model that is not wrapped yet.

        All ranks of the strategy's mesh call this together. On a deferred model `peft.get_peft_model` does the same where the
        adapter starts from random numbers. An adapter that starts from the base's values, as PiSSA's does, needs a model of
        `load_pretrained(defer=False)` and this method: the ranks without values build it blank and get it at the wrap.

        Args:
            model: As `load_pretrained` returned it, or with adapters already.
            config: A PEFT config, the same on all ranks.
            adapter_name: Of the adapter in the model.
            autocast_adapter_dtype: As PEFT has it: True keeps adapters beside a 16-bit base in float32, False in the base's
                dtype. FSDP2 wants one dtype among the trainable parameters of a layer.

        Returns:
            The PEFT model. A further adapter is not active before the model's `set_adapter` says so.

        Raises:
            CallOrderError: The model is wrapped: each rank would train an adapter of its own.
            ConfigurationError: The adapter starts from values that are not there yet.
            MissingDependencyError: peft is not installed.
            RankError: Another rank failed, or did not arrive.
        """
        return add_adapter(
            model,
            config,
            adapter_name=adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            every_rank_has_values=not self.memory_efficient_init,
            bindings=self._records.bindings,
            agreement=self._agreement("add_adapter"),
        )

    def load_adapter(
        self,
        model: nn.Module,
        directory: str,
        *,
        adapter_name: str = "default",
        is_trainable: bool = True,
        autocast_adapter_dtype: bool = True,
    ) -> nn.Module:
        """Put a saved PEFT adapter into a model that is not wrapped yet; each rank reads its part at the wrap.

        All ranks of the strategy's mesh call this together.

        Args:
            model: As `load_pretrained` returned it, or with adapters already.
            directory: Directory or hub id of the adapter, as `PeftModel.save_pretrained` writes it.
            adapter_name: Of the adapter in the model.
            is_trainable: Whether it is trained further.
            autocast_adapter_dtype: As `add_adapter`.

        Returns:
            The PEFT model. A further adapter is not active before the model's `set_adapter` says so.

        Raises:
            CallOrderError: The model is wrapped.
            CheckpointError: The adapter lacks parameters, or does not fit the model.
            ConfigurationError: The adapter is of a base that PEFT would change first, as PiSSA's is.
            MissingDependencyError: peft is not installed.
            RankError: Another rank failed, or did not arrive.
        """
        wrapped = load_adapter(
            model,
            directory,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            bindings=self._records.bindings,
            agreement=self._agreement("load_adapter"),
        )
        self._records.add_around(wrapped)
        return wrapped

    def pretrained_load_context(self) -> AbstractContextManager[None]:
        """Return a context in which a plain `from_pretrained` loads on global rank 0 alone.

        The other ranks get the model on meta. Without `memory_efficient_init` the context does nothing.

        Raises:
            ConfigurationError: The body passes its own `device_map`, or another such context is open.
            UnsupportedVersionError: The installed transformers loads on every rank all the same.
        """
        if not self.memory_efficient_init:
            return nullcontext()
        return plain_load_context(source_rank=source_rank_of(self.device_mesh), rank=dist.get_rank())

    def leave_blank(self, model: nn.Module) -> None:
        """Make the next wrap of a model read and initialise nothing: its parameters get storage, and the caller fills them.

        What has values already, as with `load_pretrained(defer=False)`, keeps them; without `memory_efficient_init` that is all.

        Args:
            model: Not wrapped.
        """
        self._records.leave_blank(model)

    @abstractmethod
    def wrap_model(self, model: nn.Module, *objects: Any) -> Any:
        """Shard a model and rebind what was made on it."""

    @final
    def wrap_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Take in an optimizer that was made on a wrapped model. All ranks of the mesh call this together.

        Args:
            optimizer: Made on the parameters that a model of this strategy has after `wrap_model`.

        Returns:
            The optimizer; through Accelerate, Accelerate's wrapper around it.

        Raises:
            OptimizerError: It holds other parameters, or some that came into the model after the wrap.
            PeerError: Another rank's optimizer does.
        """
        agreement = self._agreement("wrap_optimizer")
        with agreement.phase("check"):
            if not isinstance(optimizer, Optimizer):
                raise ConfigurationError(
                    f"wrap_optimizer: expected an optimizer, got {type(optimizer).__name__}."
                )
            known = set().union(*(trained_parameters_of(model) for model in self._wrapped))
            stale = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
            if stale:
                raise OptimizerError(
                    f"wrap_optimizer: expected parameters of a model that this strategy wrapped, got {len(stale)} others. "
                    "Make the optimizer after wrap_model, on that model's parameters, and not between a forward and its "
                    "backward; or make it before and pass it to wrap_model."
                )
            refuse_added_later(optimizer)
        for model in self._wrapped:
            self._notice(model, [optimizer])
        with agreement.phase("prepare"):
            return self._take_optimizer(optimizer)

    @abstractmethod
    def _take_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Register an optimizer whose parameters were checked."""

    @abstractmethod
    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """Return the model without wrappers around it."""

    @abstractmethod
    def _refuse(self, model: nn.Module) -> None:
        """Raise what this strategy itself has against wrapping a model."""

    def _agreement(self, call: str) -> Agreement:
        return Agreement(ranks_of(self.device_mesh), timeout_seconds=self.timeout_seconds, call=call)

    def _wrap(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        policy: MixedPrecisionPolicy,
        *,
        prepare: Callable[[], None],
        shard: Callable[[], None] | None = None,
    ) -> None:
        with telling("wrap_model", ranks_of(self.device_mesh)):
            if not isinstance(model, nn.Module):
                raise ConfigurationError(
                    f"wrap_model: expected a model first, an nn.Module, got {type(model).__name__}. Call wrap_model(model, "
                    "*optimizers)."
                )
            model = getattr(
                model, "_orig_mod", model
            )  # a compiled module calls the one inside, which is sharded
            record = self._records.take(model, efficient=self.memory_efficient_init)

        def refuse() -> None:
            refuse_edited(record.edited)
            self._refuse(model)

        options = WrapOptions(
            strategy=self.name,
            mesh=self.device_mesh,
            config=self.fsdp_config,
            policy=policy,
            efficient=self.memory_efficient_init,
            staging_bytes=default_staging_bytes(self.device_mesh.device_type),
            cpu_storage=self.cpu_storage,
            route=self.route,
            timeout_seconds=self.timeout_seconds,
        )
        with replaced_parameters_marked(model):
            self.last_report = wrap(
                model,
                optimizers,
                options,
                name=record.name,
                origins=record.origins,
                deferred=record.deferred,
                refuse=refuse,
                prepare=prepare,
                shard=shard,
            )
        self._wrapped.add(model)
        refuse_resizing(model)
        self._notice(model, optimizers)
        if self.device_mesh.size() == 1:
            warn_of_one_rank()
        else:
            watch_for_parameters_added_to(model)

    def _notice(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        if dist.get_rank() == source_rank_of(self.device_mesh):
            warn_of_half_masters(model, optimizers, mixed_precision=self.mixed_precision)
