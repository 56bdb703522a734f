"""Ways to get a checkpoint's tensors onto one device. Those of inference libraries give full tensors and no model, which on one rank is as many bytes."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

Load = Callable[[], tuple[list[torch.Tensor], dict[str, Any]]]


class NotInstalledError(Exception):
    """A library is not there."""


def _files(model: str) -> list[str]:
    return [str(path) for path in sorted(Path(model).glob("*.safetensors"))]


def _needs(package: str) -> None:
    if find_spec(package) is None:
        raise NotInstalledError(f"{package} is not installed")


def _shardwise(*, direct_io: bool) -> Callable[[str, torch.device], Load]:
    def make(model: str, device: torch.device) -> Load:
        from transformers import AutoModelForCausalLM

        from shardwise import NativeFSDPStrategy

        AutoModelForCausalLM._model_mapping  # noqa: B018  the imports are not what is measured
        mesh = init_device_mesh(device.type, (1,))

        def load() -> tuple[list[torch.Tensor], dict[str, Any]]:
            strategy = NativeFSDPStrategy(mesh, mixed_precision="no", direct_io=direct_io, cpu_storage="copy")
            wrapped = strategy.wrap_model(strategy.load_pretrained(AutoModelForCausalLM, model))
            report = strategy.last_report
            phases = dict(report.phases) if report is not None else {}
            return _locals(wrapped), {"phases": phases}

        return load

    return make


def _load_file(model: str, device: torch.device) -> Load:
    from safetensors.torch import load_file

    def load() -> tuple[list[torch.Tensor], dict[str, Any]]:
        held: list[torch.Tensor] = []
        for file in _files(model):
            held += load_file(file, device=str(device)).values()
        return held, {}

    return load


def _fastsafetensors(model: str, device: torch.device) -> Load:
    _needs("fastsafetensors")
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup  # type: ignore[import-not-found]

    kept: list[Any] = []  # its tensors are views of memory that it owns

    def load() -> tuple[list[torch.Tensor], dict[str, Any]]:
        kept.clear()
        loader = SafeTensorsFileLoader(SingleGroup(), device=str(device), nogds=True)
        loader.add_filenames({0: _files(model)})
        kept.extend((loader, loader.copy_files_to_device()))
        return [kept[1].get_tensor(key) for key in loader.get_keys()], {}

    return load


def _runai(model: str, device: torch.device) -> Load:
    _needs("runai_model_streamer")
    from runai_model_streamer import SafetensorsStreamer  # type: ignore[import-not-found]

    def load() -> tuple[list[torch.Tensor], dict[str, Any]]:
        with SafetensorsStreamer() as streamer:
            held = []
            for file in _files(model):
                streamer.stream_file(file)
                held += [tensor.to(device) for _, tensor in streamer.get_tensors()]
        return held, {}

    return load


def _instanttensor(model: str, device: torch.device) -> Load:
    _needs("instanttensor")
    import instanttensor  # type: ignore[import-not-found]

    def load() -> tuple[list[torch.Tensor], dict[str, Any]]:
        with instanttensor.safe_open(_files(model), framework="pt", device=device.index or 0) as opened:
            return [tensor for _, tensor in opened.tensors()], {}

    return load


def _locals(model: nn.Module) -> list[torch.Tensor]:
    unique = {id(parameter): parameter for parameter in model.parameters()}.values()
    return [each.to_local() if isinstance(each, DTensor) else each.detach() for each in unique]


LOADERS: dict[str, Callable[[str, torch.device], Load]] = {
    "shardwise": _shardwise(direct_io=False),
    "shardwise, direct_io": _shardwise(direct_io=True),
    "safetensors load_file": _load_file,
    "fastsafetensors": _fastsafetensors,
    "runai-model-streamer": _runai,
    "InstantTensor": _instanttensor,
}
