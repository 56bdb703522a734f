"""Loaders that hand out whole tensors: every rank gets all bytes of the checkpoint and cuts its rows out of them.

What they read and hold is the model, N times what N ranks need in all. They are made to bring a model onto one device quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

Loader = Callable[[list[str]], Iterator[tuple[str, torch.Tensor]]]


def files_of(directory: str) -> list[str]:
    """Return a checkpoint's files."""
    return sorted(str(path) for path in Path(directory).glob("*.safetensors"))


def _safetensors(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors.torch import load_file

    for file in files:
        yield from load_file(file).items()


def _fastsafetensors(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    for file in files:
        loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=True)
        loader.add_filenames({0: [file]})
        buffer = loader.copy_files_to_device()
        for name in loader.get_keys():
            yield name, buffer.get_tensor(name)
        buffer.close()
        loader.close()


def _runai(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(files)
        yield from streamer.get_tensors()


def _instanttensor(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    import instanttensor

    with instanttensor.safe_open(files, framework="pt", device="cpu") as opened:
        yield from opened.tensors()


LOADERS: dict[str, tuple[str, Loader]] = {
    "safetensors load_file": ("safetensors", _safetensors),
    "fastsafetensors": ("fastsafetensors", _fastsafetensors),
    "runai-model-streamer": ("runai_model_streamer", _runai),
    "InstantTensor": ("instanttensor", _instanttensor),
}
"""By name: the module that must be there, and the loader."""
