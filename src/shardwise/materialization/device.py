"""Which device the parameters of a model belong on, on this rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def device_of(mesh: DeviceMesh) -> torch.device:
    """Return this rank's device on a mesh, as `fully_shard` sees it."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def device_of_model(model: nn.Module) -> torch.device:
    """Return the device of the mesh that a model lies on, else of its values, else torch's default device, if values can be there."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            return device_of(parameter.device_mesh)
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            return tensor.device
    default = torch.get_default_device()
    # It is meta in the context that the model was built in.
    return torch.device("cpu") if default.type == "meta" else default


def current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a device is the current one of its kind."""
    if device.type == "cpu" or device.index is None:
        return nullcontext()
    return torch.accelerator.device_index(device.index)


@contextmanager
def on_stream(stream: torch.Stream) -> Iterator[None]:
    """Let this thread's work for a device go to a stream of it in the body."""
    with current(stream.device):  # setting a stream makes its device the current one
        before = torch.accelerator.current_stream(stream.device)
        torch.accelerator.set_stream(stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)
