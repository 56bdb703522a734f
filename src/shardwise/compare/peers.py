"""Ways of other libraries to bring a model up in shards, as their users write them: what a mode of shardwise is compared with.

Each has the methods of a strategy that a comparison uses. Model, dtype, mesh and units are those of the other modes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from shardwise.compare.modes import PEER_NAMES
from shardwise.errors import CommandError
from shardwise.materialization import (
    Agreement,
    collect_report,
    entries_of,
    origins_of,
    stored_dtypes,
)
from shardwise.materialization.agreement import ranks_of_group
from shardwise.materialization.storage import local_of
from shardwise.materialization.timeouts import timeout_seconds_of
from shardwise.profiling import LoadReport, MemoryProfile


class Peer(ABC):
    """One way.

    Args:
        mesh: One axis, or replicas and shards, over all ranks.
    """

    optimizer_first = False
    """Whether an optimizer is made before the wrap, and rebound by it."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    @abstractmethod
    def load_pretrained(self, model_cls: Any, directory: str, *, dtype: Any) -> nn.Module:
        """Build the model, with values or without."""

    def wrap_model(self, model: nn.Module, *optimizers: Optimizer) -> Any:
        """Shard the model and give it its values, if it is not there yet."""
        return (model, *optimizers) if optimizers else model


class TransformersDistributed(Peer):
    """`from_pretrained(distributed_config=DistributedConfig(fsdp_size=N))` of transformers 5."""

    def load_pretrained(self, model_cls: Any, directory: str, *, dtype: Any) -> nn.Module:
        """Load the shards.

        Raises:
            CommandError: The installed transformers has no such thing.
        """
        try:
            from transformers.distributed import DistributedConfig

            *replicas, shards = self.mesh.shape
            config = DistributedConfig(fsdp_size=shards, dp_replicate_size=math.prod(replicas))
        except (ImportError, TypeError) as error:
            raise CommandError(
                "transformers-distributed: expected DistributedConfig(fsdp_size=N, dp_replicate_size=R), which the installed "
                "transformers does not have"
            ) from error
        model: nn.Module = model_cls.from_pretrained(directory, dtype=dtype, distributed_config=config)
        return model


class DcpReader(Peer):
    """An empty model, `fully_shard`, and `torch.distributed.checkpoint.load` with `HuggingFaceStorageReader`."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(mesh)
        self._directory = ""

    def load_pretrained(self, model_cls: Any, directory: str, *, dtype: Any) -> nn.Module:
        """Build it on meta."""
        self._directory = directory
        return _empty(model_cls, directory, dtype)

    def wrap_model(self, model: nn.Module, *optimizers: Optimizer) -> Any:
        """Shard, allocate, load."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        with _sharded_and_allocated(model, self.mesh):
            state = model.state_dict()
            first_names = {name for name, _ in model.named_parameters()}
            for name, _ in model.named_parameters(remove_duplicate=False):
                if name not in first_names:
                    del state[name]  # what is tied is on disk once
            load(state, storage_reader=HuggingFaceStorageReader(self._directory))
        return super().wrap_model(model, *optimizers)


class SetModelStateDict(Peer):
    """Rank 0 loads the model; `set_model_state_dict(broadcast_from_rank0=True)` hands it out."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(mesh)
        self._full: dict[str, Any] = {}

    def load_pretrained(self, model_cls: Any, directory: str, *, dtype: Any) -> nn.Module:
        """Load it on rank 0 alone."""
        if dist.get_rank() == 0:
            loaded = model_cls.from_pretrained(directory, dtype=dtype)
            self._full = dict(loaded.state_dict())
        return _empty(model_cls, directory, dtype)

    def wrap_model(self, model: nn.Module, *optimizers: Optimizer) -> Any:
        """Shard, allocate, broadcast."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        with _sharded_and_allocated(model, self.mesh):
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(model, self._full, options=options)
        self._full = {}
        return super().wrap_model(model, *optimizers)


class StockAccelerate(Peer):
    """`Accelerator.prepare` with FSDP2 and `cpu_ram_efficient_loading`, as `accelerate launch` sets it up."""

    optimizer_first = True

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(mesh)
        if mesh.device_type == "cpu":
            raise CommandError(
                "accelerate-stock: Accelerate turns FSDP on for accelerator ranks only; on CPU ranks it would keep the whole model "
                "on each of them"
            )
        if mesh.ndim > 1:
            raise CommandError(
                "accelerate-stock: expected one axis of ranks, got replicas too: compare it without --replicas"
            )
        from accelerate import Accelerator, FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=True, auto_wrap_policy="transformer_based_wrap"
        )
        self.accelerator = Accelerator(fsdp_plugin=plugin)

    def load_pretrained(self, model_cls: Any, directory: str, *, dtype: Any) -> nn.Module:
        """Load it as a script under `accelerate launch` does."""
        model: nn.Module = model_cls.from_pretrained(directory, dtype=dtype)
        return model

    def wrap_model(self, model: nn.Module, *optimizers: Optimizer) -> Any:
        """Prepare them."""
        return self.accelerator.prepare(model, *optimizers)


_CLASSES: Final[tuple[Callable[[DeviceMesh], Peer], ...]] = (
    TransformersDistributed,
    DcpReader,
    SetModelStateDict,
    StockAccelerate,
)
PEERS: Final[Mapping[str, Callable[[DeviceMesh], Peer]]] = MappingProxyType(
    dict(zip(PEER_NAMES, _CLASSES, strict=True))
)


def report_of_peer(
    model: nn.Module, optimizer: Optimizer, profile: MemoryProfile, *, mode: str, model_name: str
) -> LoadReport:
    """Return what is known of a load that shardwise has not done: time, memory and dtypes, and no bytes read or moved.

    Args:
        model: Sharded. All ranks of the default group call this together.
        optimizer: On its parameters.
        profile: Of the load; ended.
        mode: Its name.
        model_name: Directory of the checkpoint.
    """
    agreement = Agreement(
        ranks_of_group(None), timeout_seconds=timeout_seconds_of(None, group=None), call=mode
    )
    stored = stored_dtypes(model.parameters())
    with agreement.phase("report"):
        return collect_report(
            model,
            agreement,
            profile,
            name=model_name,
            strategy=mode,
            route="not shardwise",
            route_reason="another library has loaded the model; what it read and moved is not measured",
            shard_bytes=_kept_bytes(model),
            storage_bytes=0,
            network_bytes=0,
            retried_reads=0,
            predicted={},
            origins=origins_of(entries_of(model), {}),
            converted=(),
            dtypes={
                "stored": stored,
                "compute": stored,
                "reduce": stored,
                "optimizer": stored_dtypes(p for group in optimizer.param_groups for p in group["params"]),
            },
        )


def _kept_bytes(model: nn.Module) -> int:
    """The bytes of the local tensors, those at one address once. Not of their storage: a shard may be a view of a whole mapped tensor."""
    kept = [local_of(parameter) for parameter in model.parameters()]
    return sum({local.data_ptr(): local.nbytes for local in kept}.values())


def _empty(model_cls: Any, directory: str, dtype: Any) -> nn.Module:
    """Build a model on meta, its buffers with values."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    stored = (config.dtype or torch.float32) if dtype == "auto" else dtype
    with init_empty_weights(include_buffers=False):
        model: nn.Module = model_cls.from_config(config, dtype=stored)
    model.tie_weights()  # type: ignore[operator]
    return model


@contextmanager
def _sharded_and_allocated(model: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
    """Shard an empty model and give it storage; at the end its buffers have their values again, and its ties hold."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    buffers = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    model.to_empty(device=mesh.device_type)
    model.tie_weights()  # type: ignore[operator]
    yield
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
