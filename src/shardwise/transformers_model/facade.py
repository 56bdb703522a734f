"""One object from a model's name to trained shards, with either strategy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, final

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from shardwise.errors import CallOrderError
from shardwise.materialization import CpuStorage, device_of, reshard, telling
from shardwise.profiling import LoadReport
from shardwise.strategies.mesh import ranks_to_tell
from shardwise.transformers_model.accumulation import Accumulation
from shardwise.transformers_model.adapters import put_adapter
from shardwise.transformers_model.arguments import build_model, load_tokenizer, make_strategy
from shardwise.transformers_model.checkpointing import set_checkpointing
from shardwise.transformers_model.engines import engine_of
from shardwise.transformers_model.exporting import Exporting
from shardwise.transformers_model.optimization import make_optimizer, make_scheduler
from shardwise.transformers_model.trained import lasting_name


@final
class TransformersModel(Exporting):
    """A transformers model with its optimizer, scheduler and tokenizer, trained on shards.

    Nothing is sharded, and on the default way nothing is read, before the first forward (or `load`): `set_optimizer`,
    `set_lr_scheduler` and `add_adapter_to_model` work on the model before it is wrapped. All ranks make the same calls in the
    same order, each with its own rows of a batch; gradients are averaged over the ranks.

    Args:
        model_id: Directory or hub id. None: a new model of `config`, of random values that its own initialisation makes on
            shards, the same for any number of ranks.
        model_cls: A transformers model or auto class, or its name; None is `AutoModelForCausalLM`.
        config: In place of the one beside the model: a config of transformers, or the directory or hub id of one.
        device_mesh: As for the strategies; None is one axis over all ranks.
        mixed_precision: Compute dtype: `"no"`, `"bf16"`, `"fp16"` (accelerators), `"fp8"` (Accelerate with a backend).
        strategy: `"accelerate"` or `"native_fsdp"`.
        ddp_config: As for `AccelerateStrategy`.
        fsdp_config: As for the strategies.
        grad_scaler_config: Options of the gradient scaler, for `"fp16"`.
        memory_efficient_init: As for the strategies; None is True, unless `fsdp_config` says otherwise.
        dtype: In which shards are stored: `"auto"` for the checkpoint's own, or a torch dtype.
        missing: What to do about parameters that the checkpoint lacks: `"error"`, `"init"`, or name patterns.
        defer: Every rank reads its own bytes at the wrap (True), or global rank 0 loads and sends (False).
        route: As for the strategies.
        timeout: How long to wait for a rank that does not arrive, in seconds; None is 30 minutes.
        cpu_storage: As for the strategies.
        gradient_checkpointing: Compute activations again in backward, through transformers. `fsdp_config` has torch's own
            `activation_checkpointing`, which costs one gather of each layer less.
        gradient_accumulation_steps: Backward passes to one optimizer step; gradients are averaged over them.
        sync_each_batch: Reduce gradients in every pass, keeping only a shard of them; False: only in the last pass of a
            step, keeping whole gradients on every rank until then.
        tokenizer: Any object to keep alongside; `"auto"` is the tokenizer that lies beside the model, if there is one.
        trust_remote_code: Whether code that comes with the model may run.
        **config_kwargs: Attributes of the config to change, and further arguments of `from_pretrained`.

    Raises:
        ConfigurationError: An argument that is unknown, contradictory or not possible on the device.
        CheckpointError: The checkpoint is damaged, lacks parameters, or does not fit the model.
        RankError: Ranks differ, one of them failed, or one did not arrive.
    """

    def __init__(
        self,
        model_id: str | os.PathLike[str] | None = None,
        model_cls: Any = None,
        config: Any = None,
        device_mesh: DeviceMesh | None = None,
        mixed_precision: str = "bf16",
        strategy: str = "accelerate",
        ddp_config: Mapping[str, Any] | None = None,
        fsdp_config: Mapping[str, Any] | None = None,
        grad_scaler_config: Mapping[str, Any] | None = None,
        memory_efficient_init: bool | None = None,
        *,
        dtype: Any = "auto",
        missing: str | Sequence[str] = "error",
        defer: bool = True,
        route: str = "auto",
        timeout: float | timedelta | None = None,
        cpu_storage: CpuStorage = "auto",
        gradient_checkpointing: bool = False,
        gradient_accumulation_steps: int = 1,
        sync_each_batch: bool = True,
        tokenizer: Any = "auto",
        trust_remote_code: bool = False,
        **config_kwargs: Any,
    ) -> None:
        with telling("TransformersModel", ranks_to_tell(device_mesh)):
            self._accumulation = Accumulation(gradient_accumulation_steps, sync_each_batch=sync_each_batch)
        self.strategy = make_strategy(
            strategy,
            ddp_config=ddp_config,
            device_mesh=device_mesh,
            mixed_precision=mixed_precision,
            fsdp_config=fsdp_config,
            grad_scaler_config=grad_scaler_config,
            memory_efficient_init=memory_efficient_init,
            route=route,
            timeout=timeout,
            cpu_storage=cpu_storage,
        )
        self._engine = engine_of(self.strategy)
        self._device = device_of(self.strategy.device_mesh)
        self._name = lasting_name(model_id)
        self._tokenizer = tokenizer
        self._load_tokenizer = partial(
            load_tokenizer,
            model_id,
            trust_remote_code=trust_remote_code,
            config_kwargs=dict(config_kwargs),
        )
        self.model: nn.Module = build_model(
            self.strategy,
            self._agree("TransformersModel"),
            model_id=model_id,
            model_cls=model_cls,
            config=config,
            dtype=dtype,
            missing=missing,
            defer=defer,
            trust_remote_code=trust_remote_code,
            config_kwargs=config_kwargs,
        )
        self.model.train()
        self.optimizer: Optimizer | None = None
        self.lr_scheduler: Any | None = None
        self.global_step = 0
        self._torch_optimizer: Optimizer | None = None
        self._is_wrapped = self._is_blank = False
        self._loss: torch.Tensor | None = None
        self._has_stepped = False
        if gradient_checkpointing:
            self.gradient_checkpointing_enable()

    # --- before the wrap ---

    def set_optimizer(
        self, optimizer_cls: str | Callable[..., Optimizer] = "AdamW", **kwargs: Any
    ) -> Optimizer:
        """Make the optimizer of the trainable parameters, in two groups: with weight decay, and without.

        Biases, norms and parameters of one dim do not decay. Before the wrap a second call takes the place of the first, and
        the scheduler goes with it.

        Args:
            optimizer_cls: A class, a function from groups to an optimizer, or the name of a class in `torch.optim`.
            **kwargs: Of the class: `lr`, `weight_decay` (of the first group), `betas`, ...

        Returns:
            The optimizer; after the wrap `.optimizer` is it, or Accelerate's wrapper around it.

        Raises:
            CallOrderError: The wrapped model has one already.
            ConfigurationError: No optimizer has that name.
            OptimizerError: Nothing is trainable.
        """
        if self._is_wrapped and self.optimizer is not None:
            raise CallOrderError(
                "set_optimizer: expected a model without an optimizer, or one that is not wrapped, got a wrapped model with "
                f"{type(self._torch_optimizer).__name__}. Set it before the first forward, or change its param_groups."
            )
        reshard(self.model)
        made = make_optimizer(self.model, optimizer_cls, kwargs)
        made.register_step_post_hook(self._note_step)
        self._torch_optimizer, self.lr_scheduler = made, None
        self.optimizer = self.strategy.wrap_optimizer(made) if self._is_wrapped else made
        return self.optimizer

    def set_lr_scheduler(self, scheduler_cls: str | Callable[..., Any] = "linear", **kwargs: Any) -> Any:
        """Make the scheduler, which counts optimizer steps, not backward passes and not ranks.

        Args:
            scheduler_cls: A class, the name of one in `torch.optim.lr_scheduler`, or a name that `transformers.get_scheduler`
                knows, such as `"cosine"`.
            **kwargs: Of the class; `num_warmup_steps` and `num_training_steps` for transformers' names.

        Returns:
            The scheduler.

        Raises:
            CallOrderError: There is no optimizer.
            ConfigurationError: No scheduler has that name.
        """
        if self._torch_optimizer is None:
            raise CallOrderError(
                "set_lr_scheduler: expected an optimizer, got none. Call set_optimizer first."
            )
        self.lr_scheduler = make_scheduler(self._torch_optimizer, scheduler_cls, kwargs)
        return self.lr_scheduler

    def add_adapter_to_model(
        self,
        adapter_name: str,
        config_or_dir: Any,
        *,
        is_trainable: bool = True,
        autocast_adapter_dtype: bool = True,
    ) -> nn.Module:
        """Put a PEFT adapter into the model: a new one, or one that was saved. The base is frozen. All ranks call this together.

        Args:
            adapter_name: Of the adapter in the model.
            config_or_dir: A PEFT config, for a new adapter; or the directory or hub id of a saved one.
            is_trainable: Whether a saved one is trained further.
            autocast_adapter_dtype: As for `strategy.add_adapter`.

        Returns:
            The PEFT model.

        Raises:
            CallOrderError: The model is wrapped, or has an optimizer already.
            ConfigurationError: `config_or_dir` is neither, or the adapter starts from values that are not there yet.
            MissingDependencyError: peft is not installed.
            RankError: Another rank failed, or did not arrive.
        """
        if self._is_wrapped:
            raise CallOrderError(
                "add_adapter_to_model: expected a model that is not wrapped, got one after its first forward: the adapter's "
                "parameters would not be sharded, and each rank would train its own. Add it before the first forward."
            )
        if self.optimizer is not None:
            raise CallOrderError(
                f"add_adapter_to_model: expected no optimizer yet, got {type(self.optimizer).__name__}, which holds the base's "
                "parameters and not the adapter's. Add adapters before set_optimizer."
            )
        training = self.model.training
        self.model = put_adapter(
            self.strategy,
            self.model,
            adapter_name,
            config_or_dir,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        self.model.train(training)
        return self.model

    # --- modes ---

    def train(self, mode: bool = True) -> TransformersModel:
        """Put the model into training mode, in which it begins, or out of it."""
        self.model.train(mode)
        return self

    def eval(self) -> TransformersModel:
        """Put the model into eval mode: no dropout, no gradient checkpointing."""
        return self.train(False)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Compute activations again in backward; before or after the wrap.

        Args:
            **kwargs: Of `torch.utils.checkpoint.checkpoint`; `use_reentrant` is False unless given.

        Raises:
            ConfigurationError: The model is not one of transformers that can do it.
        """
        set_checkpointing(self.model, True, {"use_reentrant": False, **kwargs})

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        set_checkpointing(self.model, False, {})

    # --- alongside ---

    @property
    def last_report(self) -> LoadReport | None:
        """What the wrap did cost; None before it."""
        return self.strategy.last_report

    @property
    def is_wrapped(self) -> bool:
        """Whether the model is sharded and has its values."""
        return self._is_wrapped

    def _wrap(self, *, blank: bool = False) -> None:
        if self._is_wrapped:
            return
        if blank:
            self.strategy.leave_blank(self.model)
        if self._torch_optimizer is None:
            self.model = self.strategy.wrap_model(self.model)
        else:
            self.model, self.optimizer = self.strategy.wrap_model(self.model, self._torch_optimizer)
        self._is_wrapped, self._is_blank = True, blank
